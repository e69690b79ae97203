//! A server that keeps its weights and its KV cache in device memory, simulated as a rule, and notices if any of it was changed.
//!
//! It loads the driver's library at run time as a real one does, and reaches device memory by the driver's calls only. All
//! along, threads of it map memory, fill it, check it and unmap it: a device range put back over a program's memory, or the
//! other way round, is found by one of the two sides.
//!
//! | request | answer |
//! |---|---|
//! | `GET /health` | 200 once the weights are in place |
//! | `GET /check` | sums of all device memory, and how many errors the threads have seen |
//! | `POST /generate` | an answer that depends on the prompt, the weights and nothing else; its state goes through the KV cache |
//! | `GET /ballast` | with `--ballast MIB`: the sum of host memory that nothing else touches |
//! | `POST /kernel?N` | starts a kernel of N milliseconds |
//! | `POST /fork` | forks a child that keeps the open descriptors |
//! | `POST /begin` | with `--late`: begins to use the device only now |
//! | `POST /managed?MIB`, `/share`, `/open`, `/fill?MIB`, `/absent?START-END` | what a driver cannot checkpoint, or not restore |
//! | `POST /put-back?START-END`, `/populated`, `/huge` | copies that a driver can restore: through a userfaultfd, populated, in huge pages |

mod refused;

use std::ffi::{c_int, c_uint, c_void};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libloading::Library;

const KV_SLOTS: u64 = 64;
const KV_SLOT_BYTES: usize = 4096;
const BLOCK: usize = 1 << 20;

/// How the server is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// The driver's library.
    pub library: PathBuf,
    /// Port on the loopback interface; 0 lets the kernel choose, and the first line of output tells.
    pub port: u16,
    /// Size of the weights in MiB.
    pub mib: usize,
    /// Threads that map and unmap memory.
    pub threads: usize,
    /// Number of the device.
    pub device: i32,
    /// Number of another device, for the KV cache.
    pub kv_device: Option<i32>,
    /// What the weights are made of.
    pub seed: u64,
    /// Use the device only after `POST /begin`.
    pub late: bool,
    /// Host memory in MiB that nothing touches but who asks for it.
    pub ballast: usize,
    /// Weights are numbers of 16 bits as trained ones are, in place of bytes without any order.
    pub half: bool,
    /// Use no device: weights and KV cache lie in host memory. For comparisons.
    pub host: bool,
}

impl Options {
    /// From arguments such as `--mib 64`.
    ///
    /// # Errors
    /// The argument that is not understood.
    pub fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self {
            library: PathBuf::from("libcuda.so.1"),
            port: 0,
            mib: 16,
            threads: 2,
            device: 0,
            kv_device: None,
            seed: 1,
            late: false,
            ballast: 0,
            half: false,
            host: false,
        };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            match flag.as_str() {
                "--late" => {
                    options.late = true;
                    continue;
                }
                "--host" => {
                    options.host = true;
                    continue;
                }
                "--half" => {
                    options.half = true;
                    continue;
                }
                _ => {}
            }
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{flag} {value}: {error}"));
            match flag.as_str() {
                "--library" => options.library = PathBuf::from(value),
                "--port" => options.port = u16::try_from(number()?).map_err(|error| error.to_string())?,
                "--mib" => options.mib = usize::try_from(number()?).map_err(|error| error.to_string())?,
                "--ballast" => {
                    options.ballast = usize::try_from(number()?).map_err(|error| error.to_string())?
                }
                "--threads" => {
                    options.threads = usize::try_from(number()?).map_err(|error| error.to_string())?
                }
                "--device" => options.device = i32::try_from(number()?).map_err(|error| error.to_string())?,
                "--kv-device" => {
                    options.kv_device = Some(i32::try_from(number()?).map_err(|error| error.to_string())?);
                }
                "--seed" => options.seed = number()?,
                other => return Err(format!("unknown flag {other}")),
            }
        }
        Ok(options)
    }
}

/// Serves until it is killed.
///
/// # Errors
/// What kept it from serving.
pub fn main(options: &Options) -> Result<(), String> {
    let listener = TcpListener::bind(("127.0.0.1", options.port)).map_err(|error| error.to_string())?;
    let server = Arc::new(Server {
        model: Mutex::new(None),
        ballast: (1..=options.ballast * (BLOCK / 8)).map(|word| mixed(word as u64)).collect(),
        options: options.clone(),
        churned: AtomicU64::new(0),
        spoiled: AtomicU64::new(0),
    });
    if !options.late {
        server.begin()?;
    }
    for _ in 0..options.threads {
        let server = server.clone();
        std::thread::spawn(move || server.churn());
    }
    let port = listener.local_addr().map_err(|error| error.to_string())?.port();
    let kind = if server.is_simulated() { "simulated" } else { "real" };
    say(&format!("{kind} device memory, port {port}"));
    for socket in listener.incoming().flatten() {
        let server = server.clone();
        std::thread::spawn(move || server.serve(&socket));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "how a test learns the port")]
fn say(line: &str) {
    println!("{line}");
}

/// A child without exec, as data loaders make them.
fn fork_sleeper() {
    // SAFETY: the child makes async-signal-safe calls only.
    if unsafe { libc::fork() } == 0 {
        loop {
            // SAFETY: plain call without memory.
            unsafe { libc::pause() };
        }
    }
}

/// The driver's calls that the server makes.
struct Driver {
    alloc: unsafe extern "C" fn(*mut u64, usize) -> u32,
    to_device: unsafe extern "C" fn(u64, *const c_void, usize) -> u32,
    to_host: unsafe extern "C" fn(*mut c_void, u64, usize) -> u32,
    set_current: unsafe extern "C" fn(*mut c_void) -> u32,
    kernel: Kernel,
    /// How often a restore found something in the place of a device range; the simulated driver only.
    clobbered: Option<unsafe extern "C" fn() -> u32>,
    context: usize,
    /// The context of the device that has the KV cache, mostly the same.
    kv_context: usize,
    /// Absent where host memory takes the device's place.
    library: Option<&'static Library>,
}

/// How a kernel is started that only takes time.
enum Kernel {
    /// The simulated driver's own call, with milliseconds.
    Simulated(unsafe extern "C" fn(u64) -> u32),
    /// A function that the real driver has compiled.
    Real { function: usize, launch: LaunchKernel },
}

type LaunchKernel = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> u32;

/// Waits on the device for so many nanoseconds.
const SPIN: &std::ffi::CStr = c".version 6.4
.target sm_50
.address_size 64
.visible .entry spin(.param .u64 time) {
  .reg .u64 %end, %now;
  .reg .pred %again;
  ld.param.u64 %end, [time];
  mov.u64 %now, %globaltimer;
  add.u64 %end, %end, %now;
AGAIN:
  mov.u64 %now, %globaltimer;
  setp.lt.u64 %again, %now, %end;
  @%again bra AGAIN;
  ret;
}
";

impl Driver {
    fn open(options: &Options) -> Result<Self, String> {
        if options.host {
            return Ok(Self::host());
        }
        // SAFETY: the simulated driver, or the real one.
        let library = unsafe { Library::new(&options.library) }.map_err(|error| error.to_string())?;
        // It stays loaded, as the real one does.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: the type is the one of the driver's header.
                let found = unsafe { library.get($name) };
                *found.map_err(|error| error.to_string())?
            }};
        }
        let init: unsafe extern "C" fn(c_uint) -> u32 = symbol!("cuInit");
        let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> u32 =
            symbol!("cuDevicePrimaryCtxRetain");
        let context_of = |device| {
            let mut context = std::ptr::null_mut();
            // SAFETY: writes one pointer.
            done("cuDevicePrimaryCtxRetain", unsafe { retain(&raw mut context, device) })?;
            Ok::<_, String>(context)
        };
        // SAFETY: takes a number.
        done("cuInit", unsafe { init(0) })?;
        let context = context_of(options.device)?;
        let kv_context = options.kv_device.map_or(Ok(context), context_of)?;
        // SAFETY: the type is that of the simulated driver's function; a real one has none.
        let simulated = unsafe { library.get::<unsafe extern "C" fn(u64) -> u32>("rewarmSimLaunch") };
        let kernel = match simulated {
            Ok(launch) => Kernel::Simulated(*launch),
            Err(_) => {
                let set: unsafe extern "C" fn(*mut c_void) -> u32 = symbol!("cuCtxSetCurrent");
                let load: unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> u32 =
                    symbol!("cuModuleLoadData");
                let find: unsafe extern "C" fn(
                    *mut *mut c_void,
                    *mut c_void,
                    *const std::ffi::c_char,
                ) -> u32 = symbol!("cuModuleGetFunction");
                let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
                // SAFETY: the context that was made above.
                done("cuCtxSetCurrent", unsafe { set(context) })?;
                // SAFETY: a text that ends with a zero byte.
                done("cuModuleLoadData", unsafe { load(&raw mut module, SPIN.as_ptr().cast()) })?;
                // SAFETY: the module that was just loaded, and a name that ends with a zero byte.
                let found = unsafe { find(&raw mut function, module, c"spin".as_ptr()) };
                done("cuModuleGetFunction", found)?;
                Kernel::Real { function: function.expose_provenance(), launch: symbol!("cuLaunchKernel") }
            }
        };
        // SAFETY: as above.
        let clobbered = unsafe { library.get::<unsafe extern "C" fn() -> u32>("rewarmSimClobbered") };
        Ok(Self {
            alloc: symbol!("cuMemAlloc_v2"),
            to_device: symbol!("cuMemcpyHtoD_v2"),
            to_host: symbol!("cuMemcpyDtoH_v2"),
            set_current: symbol!("cuCtxSetCurrent"),
            kernel,
            clobbered: clobbered.ok().map(|clobbered| *clobbered),
            context: context.expose_provenance(),
            kv_context: kv_context.expose_provenance(),
            library: Some(library),
        })
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<(), String> {
        self.make_current(self.context)
    }

    /// The same with the context of the KV cache.
    fn enter_kv(&self) -> Result<(), String> {
        self.make_current(self.kv_context)
    }

    fn make_current(&self, context: usize) -> Result<(), String> {
        let context = std::ptr::with_exposed_provenance_mut(context);
        // SAFETY: a context that the driver gave.
        done("cuCtxSetCurrent", unsafe { (self.set_current)(context) })
    }

    /// Host memory in place of a device's.
    fn host() -> Self {
        Self {
            alloc: in_host::allocate,
            to_device: in_host::to_device,
            to_host: in_host::to_host,
            set_current: in_host::set_current,
            kernel: Kernel::Simulated(in_host::launch),
            clobbered: None,
            context: 1,
            kv_context: 1,
            library: None,
        }
    }

    /// Whether it is the simulated one.
    fn is_simulated(&self) -> bool {
        matches!(self.kernel, Kernel::Simulated(_))
    }

    /// Starts a kernel of so many milliseconds and does not wait for it.
    fn launch(&self, ms: u64) -> Result<(), String> {
        self.enter()?;
        let code = match &self.kernel {
            // SAFETY: takes a number.
            Kernel::Simulated(launch) => unsafe { launch(ms) },
            Kernel::Real { function, launch } => {
                let mut time = ms * 1_000_000;
                let mut arguments = [(&raw mut time).cast::<c_void>()];
                let (function, null) =
                    (std::ptr::with_exposed_provenance_mut(*function), std::ptr::null_mut());
                let list = arguments.as_mut_ptr();
                // SAFETY: one block of one thread; the driver copies the argument before it returns.
                unsafe { launch(function, 1, 1, 1, 1, 1, 1, 0, null, list, std::ptr::null_mut()) }
            }
        };
        done("cuLaunchKernel", code)
    }

    fn clobbered(&self) -> u32 {
        // SAFETY: a call without arguments.
        self.clobbered.map_or(0, |clobbered| unsafe { clobbered() })
    }

    fn allocate(&self, bytes: usize) -> Result<u64, String> {
        let mut address = 0;
        // SAFETY: writes one address.
        done("cuMemAlloc", unsafe { (self.alloc)(&raw mut address, bytes) })?;
        Ok(address)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        // SAFETY: reads the borrowed bytes.
        done("cuMemcpyHtoD", unsafe { (self.to_device)(at, bytes.as_ptr().cast(), bytes.len()) })
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), String> {
        // SAFETY: fills the borrowed buffer.
        done("cuMemcpyDtoH", unsafe { (self.to_host)(bytes.as_mut_ptr().cast(), at, bytes.len()) })
    }
}

/// The driver's calls on host memory.
mod in_host {
    use std::ffi::c_void;

    pub(super) unsafe extern "C" fn allocate(out: *mut u64, bytes: usize) -> u32 {
        let memory: &'static mut [u8] = Box::leak(vec![0; bytes].into_boxed_slice());
        // SAFETY: the caller gives a place for one address.
        unsafe { out.write(memory.as_mut_ptr().expose_provenance() as u64) };
        0
    }

    pub(super) unsafe extern "C" fn to_device(at: u64, from: *const c_void, bytes: usize) -> u32 {
        let to = std::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(at).unwrap_or(0));
        // SAFETY: within memory that was allocated above and is never freed.
        unsafe { std::ptr::copy(from.cast(), to, bytes) };
        0
    }

    pub(super) unsafe extern "C" fn to_host(to: *mut c_void, at: u64, bytes: usize) -> u32 {
        let from = std::ptr::with_exposed_provenance::<u8>(usize::try_from(at).unwrap_or(0));
        // SAFETY: as above.
        unsafe { std::ptr::copy(from, to.cast(), bytes) };
        0
    }

    pub(super) unsafe extern "C" fn set_current(_: *mut c_void) -> u32 {
        0
    }

    pub(super) unsafe extern "C" fn launch(_: u64) -> u32 {
        0
    }
}

fn done(call: &str, code: u32) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call}: the driver says {code}")) }
}

/// What lies in device memory.
struct Model {
    driver: Driver,
    weights: u64,
    kv: u64,
    bytes: usize,
    /// Sum of the weights as they were made.
    sum: u64,
}

/// A number of the type bfloat16 from noise: sign and fraction are noise, and each exponent is half as frequent as the next larger one.
fn half(noise: u64) -> u16 {
    let exponent = 120 - u16::try_from((noise >> 16).trailing_zeros().min(40)).expect("small");
    let [low, high, ..] = noise.to_le_bytes();
    u16::from(high & 0x80) << 8 | exponent << 7 | u16::from(low & 0x7f)
}

/// A word that no compression makes smaller: SplitMix64.
fn mixed(number: u64) -> u64 {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// 64-bit FNV-1a over words: quick, and every bit counts.
fn mix(sum: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(sum, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    })
}

const START: u64 = 0xcbf2_9ce4_8422_2325;

impl Model {
    fn make(options: &Options) -> Result<Self, String> {
        let driver = Driver::open(options)?;
        let bytes = options.mib.max(1) * BLOCK;
        driver.enter()?;
        let weights = driver.allocate(bytes)?;
        driver.enter_kv()?;
        let kv = driver.allocate(usize::try_from(KV_SLOTS).expect("small") * KV_SLOT_BYTES)?;
        driver.enter()?;
        let mut model = Self { driver, weights, kv, bytes, sum: START };
        let mut state = options.seed;
        for block in 0..model.blocks() {
            // One block in four is zeros, as memory of real servers partly is.
            let mut content = vec![0; BLOCK];
            if block % 4 != 3 && options.half {
                let words = (block * BLOCK / 2) as u64..;
                for (weight, number) in content.chunks_mut(2).zip(words) {
                    weight.copy_from_slice(&half(mixed(options.seed ^ number << 8)).to_le_bytes());
                }
            } else if block % 4 != 3 {
                for word in content.chunks_mut(8) {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    word.copy_from_slice(&state.to_le_bytes());
                }
            }
            model.driver.write(model.weights + (block * BLOCK) as u64, &content)?;
            model.sum = mix(model.sum, &content);
        }
        Ok(model)
    }

    fn blocks(&self) -> usize {
        self.bytes / BLOCK
    }

    fn sum_now(&self) -> Result<u64, String> {
        self.driver.enter()?;
        let mut content = vec![0; BLOCK];
        (0..self.blocks()).try_fold(START, |sum, block| {
            self.driver.read(self.weights + (block * BLOCK) as u64, &mut content)?;
            Ok(mix(sum, &content))
        })
    }

    fn kv_sum(&self) -> Result<u64, String> {
        self.driver.enter_kv()?;
        let mut content = vec![0; KV_SLOT_BYTES];
        (0..KV_SLOTS).try_fold(START, |sum, slot| {
            self.driver.read(self.kv + slot * KV_SLOT_BYTES as u64, &mut content)?;
            Ok(mix(sum, &content))
        })
    }

    fn generate(&self, prompt: &[u8]) -> Result<u64, String> {
        let key = mix(START, prompt);
        let slot = self.kv + key % KV_SLOTS * KV_SLOT_BYTES as u64;
        let mut content = vec![0; KV_SLOT_BYTES];
        let mut answer = key;
        for token in 0..8_u64 {
            let pages = (self.bytes / KV_SLOT_BYTES) as u64;
            let page = mix(answer, &token.to_le_bytes()) % pages;
            self.driver.enter()?;
            self.driver.read(self.weights + page * KV_SLOT_BYTES as u64, &mut content)?;
            answer = mix(answer, &content);
            // What was worked out so far is kept on the device, and read back for the next token.
            self.driver.enter_kv()?;
            self.driver.write(slot + token * 8, &answer.to_le_bytes())?;
            let mut kept = [0; 8];
            self.driver.read(slot + token * 8, &mut kept)?;
            answer ^= u64::from_le_bytes(kept).rotate_left(7);
        }
        Ok(answer)
    }
}

struct Server {
    model: Mutex<Option<Arc<Model>>>,
    options: Options,
    ballast: Vec<u64>,
    churned: AtomicU64,
    spoiled: AtomicU64,
}

impl Server {
    fn begin(&self) -> Result<(), String> {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        if model.is_none() {
            *model = Some(Arc::new(Model::make(&self.options)?));
        }
        Ok(())
    }

    fn model(&self) -> Result<Arc<Model>, String> {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.clone().ok_or_else(|| "the device is not in use yet".to_owned())
    }

    /// Until a device is used, nothing is real.
    fn is_simulated(&self) -> bool {
        self.model().map_or(true, |model| model.driver.is_simulated())
    }

    /// An answer without content.
    fn said(&self) -> String {
        format!("{{\"simulated\":{}}}", self.is_simulated())
    }

    /// Maps memory, fills it, checks it and unmaps it, for ever.
    fn churn(&self) {
        let mut round = 0_u64;
        loop {
            round += 1;
            let bytes = usize::try_from(1 + round % 4).expect("small") * BLOCK;
            if !whole(bytes, round) {
                self.spoiled.fetch_add(1, Ordering::SeqCst);
            }
            self.churned.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn serve(&self, socket: &TcpStream) {
        // A peer that goes away is no matter of the server's.
        let _ = self.converse(socket);
    }

    fn converse(&self, mut socket: &TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(socket);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let mut length = 0;
            loop {
                let mut header = String::new();
                if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                    break;
                }
                if let Some((name, value)) = header.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = value.trim().parse::<u64>().unwrap_or(0).min(1 << 20);
                }
            }
            let mut body = Vec::new();
            reader.by_ref().take(length).read_to_end(&mut body)?;
            let mut words = line.split_whitespace();
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let (status, text) = match self.answer(method, path, &body) {
                Ok(text) => ("200 OK", text),
                Err(text) => {
                    let simulated = self.is_simulated();
                    ("503 Service Unavailable", format!("{{\"simulated\":{simulated},\"error\":{text:?}}}"))
                }
            };
            let length = text.len();
            write!(
                socket,
                "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{text}"
            )?;
        }
    }

    fn answer(&self, method: &str, path: &str, body: &[u8]) -> Result<String, String> {
        match (method, path.split_once('?').unwrap_or((path, ""))) {
            ("GET", ("/health", _)) if self.options.late => Ok(self.said()),
            ("GET", ("/health", _)) => self.model().map(|_| self.said()),
            ("POST", ("/fork", _)) => {
                // Later, so that the child does not keep this connection open.
                std::thread::spawn(|| {
                    std::thread::sleep(Duration::from_millis(100));
                    fork_sleeper();
                });
                Ok(self.said())
            }
            ("GET", ("/ballast", _)) => {
                let sum = self.ballast.iter().fold(0_u64, |sum, word| sum.rotate_left(1) ^ word);
                Ok(format!("{{\"simulated\":true,\"sum\":\"{sum:016x}\"}}"))
            }
            ("POST", ("/begin", _)) => self.begin().map(|()| self.said()),
            ("GET", ("/check", _)) => {
                let model = self.model()?;
                let (sum, kv) = (model.sum_now()?, model.kv_sum()?);
                let (clobbered, simulated) = (model.driver.clobbered(), model.driver.is_simulated());
                let spoiled = self.spoiled.load(Ordering::SeqCst);
                Ok(format!(
                    "{{\"simulated\":{simulated},\"sum\":\"{sum:016x}\",\"expected\":\"{:016x}\",\"kv\":\"{kv:016x}\",\"clobbered\":{clobbered},\"spoiled\":{spoiled},\"churned\":{}}}",
                    model.sum,
                    self.churned.load(Ordering::SeqCst)
                ))
            }
            ("POST", ("/generate", _)) => {
                let model = self.model()?;
                let (answer, simulated) = (model.generate(body)?, model.driver.is_simulated());
                Ok(format!("{{\"simulated\":{simulated},\"answer\":\"{answer:016x}\"}}"))
            }
            ("POST", ("/kernel", ms)) => {
                let ms = ms.parse().map_err(|_| format!("milliseconds {ms:?}"))?;
                let model = self.model()?;
                model.driver.launch(ms)?;
                Ok(self.said())
            }
            ("POST", (call, value)) => refused::answer(&*self.model()?, call, value, body),
            _ => Err(format!("nothing at {method} {path}")),
        }
    }
}

/// Whether memory that was mapped and filled still has its content before it is unmapped.
fn whole(bytes: usize, mark: u64) -> bool {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if place == libc::MAP_FAILED {
        return true;
    }
    let words: *mut u64 = place.cast();
    let step = BLOCK / 16 / 8;
    for at in (0..bytes / 8).step_by(step) {
        // SAFETY: inside the mapping.
        unsafe { words.add(at).write_volatile(mark) };
    }
    std::thread::sleep(Duration::from_micros(200));
    // SAFETY: inside the mapping.
    let same = (0..bytes / 8).step_by(step).all(|at| unsafe { words.add(at).read_volatile() } == mark);
    // SAFETY: our own mapping, which nothing refers to.
    unsafe { libc::munmap(place, bytes) };
    same
}

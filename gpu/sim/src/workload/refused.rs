//! What a driver cannot checkpoint, or not restore: managed memory, memory that processes share, copies that are absent, a
//! device that is full.

use std::ffi::{c_int, c_uint, c_void};

use super::{BLOCK, Driver, Model, done};

/// `CU_MEM_ATTACH_GLOBAL`.
const ATTACH_GLOBAL: c_uint = 1;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY_PEER_ACCESS: c_uint = 1;

/// `CUipcMemHandle`.
#[repr(C)]
struct IpcMemHandle([u8; 64]);

/// Answers a request for one of these.
pub(super) fn answer(model: &Model, call: &str, value: &str, body: &[u8]) -> Result<String, String> {
    let driver = &model.driver;
    let said = |what: String| format!("{{\"simulated\":{}{what}}}", driver.is_simulated());
    let mib = || value.parse::<usize>().map(|mib| mib * BLOCK).map_err(|_| format!("MiB {value:?}"));
    match call {
        "/managed" => driver.managed(mib()?).map(|()| said(String::new())),
        "/share" => driver.share(model.weights).map(|handle| said(format!(",\"handle\":\"{handle}\""))),
        "/open" => driver.open_shared(body).map(|()| said(String::new())),
        "/fill" => driver.fill(mib()?).map(|pieces| said(format!(",\"pieces\":{pieces}"))),
        "/absent" => {
            let number = |text| usize::from_str_radix(text, 16).map_err(|_| format!("range {value:?}"));
            let (start, end) = value.split_once('-').ok_or_else(|| format!("range {value:?}"))?;
            absent(number(start)?, number(end)?).map(|()| said(String::new()))
        }
        "/put-back" | "/populated" | "/huge" => {
            let number = |text| usize::from_str_radix(text, 16).map_err(|_| format!("range {value:?}"));
            let (start, end) = value.split_once('-').ok_or_else(|| format!("range {value:?}"))?;
            let (start, length) = (number(start)?, number(end)?.saturating_sub(number(start)?));
            let done = match call {
                "/put-back" => put_back(start, length),
                "/populated" => advise(start, length, libc::MADV_POPULATE_WRITE),
                _ => in_huge_pages(start, length),
            };
            done.map(|()| said(String::new()))
        }
        _ => Err(format!("nothing at POST {call}")),
    }
}

impl Driver {
    /// A function that is looked up when it is wanted.
    ///
    /// # Safety
    /// `T` must be its type.
    unsafe fn wanted<T: Copy>(&self, name: &str) -> Result<T, String> {
        let library = self.library.ok_or("no device is in use")?;
        // SAFETY: by this function's contract.
        let found = unsafe { library.get::<T>(name) };
        found.map(|found| *found).map_err(|error| error.to_string())
    }

    /// Takes managed memory and uses it.
    fn managed(&self, bytes: usize) -> Result<(), String> {
        self.enter()?;
        // SAFETY: the type is the one of the driver's header.
        let allocate: unsafe extern "C" fn(*mut u64, usize, c_uint) -> u32 =
            unsafe { self.wanted("cuMemAllocManaged") }?;
        let mut address = 0;
        // SAFETY: writes one address.
        done("cuMemAllocManaged", unsafe { allocate(&raw mut address, bytes, ATTACH_GLOBAL) })?;
        self.write(address, &[7; 4096])
    }

    /// What another process opens this memory by, in hexadecimal digits.
    fn share(&self, address: u64) -> Result<String, String> {
        self.enter()?;
        // SAFETY: as above.
        let get: unsafe extern "C" fn(*mut IpcMemHandle, u64) -> u32 =
            unsafe { self.wanted("cuIpcGetMemHandle") }?;
        let mut handle = IpcMemHandle([0; 64]);
        // SAFETY: writes one handle.
        done("cuIpcGetMemHandle", unsafe { get(&raw mut handle, address) })?;
        Ok(handle.0.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Opens what another process shares.
    fn open_shared(&self, digits: &[u8]) -> Result<(), String> {
        self.enter()?;
        let text = std::str::from_utf8(digits).map_err(|error| error.to_string())?;
        let mut handle = IpcMemHandle([0; 64]);
        for (index, byte) in handle.0.iter_mut().enumerate() {
            let pair = text.get(2 * index..2 * index + 2).ok_or("a handle that is too short")?;
            *byte = u8::from_str_radix(pair, 16).map_err(|error| error.to_string())?;
        }
        // SAFETY: as above.
        let open: unsafe extern "C" fn(*mut u64, IpcMemHandle, c_uint) -> u32 =
            unsafe { self.wanted("cuIpcOpenMemHandle_v2") }?;
        let mut address = 0;
        // SAFETY: writes one address.
        done("cuIpcOpenMemHandle", unsafe { open(&raw mut address, handle, LAZY_PEER_ACCESS) })
    }

    /// Takes memory in pieces of `bytes` until there is none, and tells how many.
    fn fill(&self, bytes: usize) -> Result<usize, String> {
        self.enter()?;
        Ok(std::iter::from_fn(|| self.allocate(bytes).ok()).count())
    }
}

/// `struct uffdio_api`.
#[repr(C)]
struct Api([u64; 3]);
/// `struct uffdio_register`: start, length, mode, and what the kernel allows.
#[repr(C)]
struct Register([u64; 4]);
/// `struct uffdio_copy`: to, from, length, mode, and how much was copied.
#[repr(C)]
struct PutBack([u64; 5]);
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const MODE_MISSING: u64 = 1;

fn failed(call: &str) -> String {
    format!("{call}: {}", std::io::Error::last_os_error())
}

/// The driver's copies, which nothing of this program refers to.
fn advise(start: usize, length: usize, advice: c_int) -> Result<(), String> {
    let place: *mut c_void = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: by this function's contract with the one who asks: memory of the driver's, which it lays out and never frees here.
    let done = unsafe { libc::madvise(place, length, advice) };
    if done < 0 { Err(failed(&format!("madvise {advice}"))) } else { Ok(()) }
}

/// Has the kernel ask a userfaultfd for these pages that nobody answers, and takes their content away.
fn absent(start: usize, end: usize) -> Result<(), String> {
    taken_away(start, end.saturating_sub(start)).map(|_| ())
}

/// The descriptor stays open as long as the process lives.
fn taken_away(start: usize, length: usize) -> Result<c_int, String> {
    // SAFETY: takes a number.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let uffd = c_int::try_from(raw).ok().filter(|fd| *fd >= 0).ok_or_else(|| failed("userfaultfd"))?;
    let mut api = Api([0xaa, 0, 0]);
    // SAFETY: the structure that this request reads and fills.
    if unsafe { libc::ioctl(uffd, UFFDIO_API, &raw mut api) } < 0 {
        return Err(failed("UFFDIO_API"));
    }
    let mut register = Register([start as u64, length as u64, MODE_MISSING, 0]);
    // SAFETY: as above.
    if unsafe { libc::ioctl(uffd, UFFDIO_REGISTER, &raw mut register) } < 0 {
        return Err(failed("UFFDIO_REGISTER"));
    }
    advise(start, length, libc::MADV_DONTNEED).map(|()| uffd)
}

/// The same, and puts the content back through the userfaultfd. The pages stay registered with it.
fn put_back(start: usize, length: usize) -> Result<(), String> {
    let content = content(start, length);
    let uffd = taken_away(start, length)?;
    let mut copy = PutBack([start as u64, content.as_ptr().expose_provenance() as u64, length as u64, 0, 0]);
    // SAFETY: the structure that this request reads and fills; the content lives until it is copied.
    if unsafe { libc::ioctl(uffd, UFFDIO_COPY, &raw mut copy) } < 0 {
        return Err(failed("UFFDIO_COPY"));
    }
    Ok(())
}

fn content(start: usize, length: usize) -> Vec<u8> {
    let place: *const u8 = std::ptr::with_exposed_provenance(start);
    // SAFETY: the driver's copies, which nobody changes while the process is checkpointed.
    unsafe { std::slice::from_raw_parts(place, length) }.to_vec()
}

/// Takes the content away and writes it back, as which the kernel makes huge pages where it has any.
fn in_huge_pages(start: usize, length: usize) -> Result<(), String> {
    let content = content(start, length);
    advise(start, length, libc::MADV_HUGEPAGE)?;
    advise(start, length, libc::MADV_DONTNEED)?;
    let place: *mut u8 = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: as many bytes as were read from there.
    unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), place, length) };
    Ok(())
}

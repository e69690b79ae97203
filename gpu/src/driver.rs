//! The driver's checkpoint calls, bound at run time.
//!
//! Most machines have no `libcuda.so.1`; an old one lacks symbols, and a new one answers with numbers that nobody here
//! knows. All of these are ordinary errors. So the functions are looked up by hand, every result and state is an integer,
//! and the argument structures are written down here with their sizes asserted: the `cudarc` crate has closed enums for
//! the former, panics for the latter, and none of the functions.
//!
//! Only the helper process may use this: a call can hang or crash, and neither may take a shim with it.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libloading::Library;
use serde::{Deserialize, Serialize};

use crate::states::{State, Step};
use crate::topology::{Device, Pair, Uuid};

/// The first driver that has the calls (R570).
pub const VERSION_MIN: Version = Version(12_080);
/// The first driver that can restore onto other devices (R580).
pub const VERSION_MAP: Version = Version(13_000);

/// A version as `cuDriverGetVersion` tells it: 1000 times major and 10 times minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A result as the driver tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(pub u32);

impl Code {
    /// It was done.
    pub const SUCCESS: Self = Self(0);
    /// No such process, or arguments that do not fit.
    pub const INVALID_VALUE: Self = Self(1);
    /// Too little device memory.
    pub const OUT_OF_MEMORY: Self = Self(2);
    /// The state does not allow the step.
    pub const ILLEGAL_STATE: Self = Self(401);
    /// Rights are missing, or what the operating system refused.
    pub const OPERATING_SYSTEM: Self = Self(304);
    /// The lock's time is over and work still runs.
    pub const NOT_READY: Self = Self(600);
    /// The caller lacks a context that the step needs.
    pub const NOT_PERMITTED: Self = Self(800);
    /// The driver cannot do this with this process.
    pub const NOT_SUPPORTED: Self = Self(801);
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "success",
            1 => "invalid value",
            2 => "out of memory",
            3 => "not initialized",
            100 => "no device",
            201 => "invalid context",
            304 => "operating system",
            401 => "illegal state",
            600 => "not ready",
            800 => "not permitted",
            801 => "not supported",
            999 => "unknown",
            other => return write!(f, "result {other}, which this program does not know"),
        };
        write!(f, "{name} ({})", self.0)
    }
}

/// Why there is no driver to talk to, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The library cannot be loaded.
    #[error("the CUDA driver's library {library} cannot be loaded: {reason}", library = library.display())]
    Missing {
        /// Which library.
        library: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The library lacks a function.
    #[error("{library} has no {symbol}: a driver of R570 or newer is needed", library = library.display())]
    Symbol {
        /// Which library.
        library: PathBuf,
        /// The function.
        symbol: &'static str,
    },
    /// The driver is older than these calls.
    #[error("{library} supports CUDA {found}, at least {VERSION_MIN} (R570) is needed", library = library.display())]
    TooOld {
        /// Which library.
        library: PathBuf,
        /// Its version.
        found: Version,
    },
    /// A call that this crate makes for itself failed.
    #[error("{call}: {code}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: Code,
    },
}

/// Where the library is looked for when nothing else is said.
pub const LIBRARY: &str = "libcuda.so.1";

#[repr(C)]
#[derive(Debug, Default)]
struct LockArgs {
    timeout_ms: c_uint,
    reserved0: c_uint,
    reserved1: [u64; 7],
}

#[repr(C)]
#[derive(Debug)]
struct RestoreArgs {
    pairs: *const Pair,
    count: c_uint,
    pad: c_uint,
    /// CUDA 13.4's custom storage; must be zero.
    storage: *mut c_void,
    reserved: [u8; 40],
}

/// The arguments of checkpoint and unlock: all reserved, all zero.
#[repr(C)]
#[derive(Debug, Default)]
struct NoArgs([u64; 8]);

// In every version of the driver these have 64 bytes, and what a version does not know must be zero.
const _: () =
    assert!(size_of::<LockArgs>() == 64 && size_of::<RestoreArgs>() == 64 && size_of::<NoArgs>() == 64);
const _: () = assert!(std::mem::offset_of!(RestoreArgs, storage) == 16);
const _: () = assert!(size_of::<Pair>() == 32);

type OnePid<T> = unsafe extern "C" fn(c_int, *mut T) -> u32;

/// The functions, as the library has them. They stay valid as long as the library is loaded, which is for ever.
#[derive(Debug, Clone, Copy)]
struct Calls {
    init: unsafe extern "C" fn(c_uint) -> u32,
    count: unsafe extern "C" fn(*mut c_int) -> u32,
    get: unsafe extern "C" fn(*mut c_int, c_int) -> u32,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> u32,
    uuid: unsafe extern "C" fn(*mut Uuid, c_int) -> u32,
    total: unsafe extern "C" fn(*mut usize, c_int) -> u32,
    state: OnePid<u32>,
    thread: OnePid<c_int>,
    lock: OnePid<LockArgs>,
    checkpoint: OnePid<NoArgs>,
    restore: OnePid<RestoreArgs>,
    unlock: OnePid<NoArgs>,
}

/// A loaded driver.
#[derive(Debug)]
pub struct Driver {
    loaded: &'static Library,
    calls: Calls,
    version: Version,
    library: PathBuf,
}

impl Driver {
    /// Loads the library and looks the functions up; touches no device.
    ///
    /// # Errors
    /// A missing library, a missing function or a version that is too old.
    pub fn load(library: &Path) -> Result<Self, DriverError> {
        // SAFETY: loading runs the library's initialisers; it is the driver, or what the user names in its place.
        let loaded = unsafe { Library::new(library) };
        let loaded = loaded.map_err(|error| DriverError::Missing {
            library: library.to_owned(),
            reason: error.to_string(),
        })?;
        // Never unloaded: the driver has threads of its own.
        let loaded: &'static Library = Box::leak(Box::new(loaded));
        let path = library.to_owned();
        // The version first: an old driver is called old, and not a library without symbols.
        // SAFETY: the type is the one of the driver's header, as is each in `Calls`.
        let version =
            unsafe { find::<unsafe extern "C" fn(*mut c_int) -> u32>(loaded, &path, "cuDriverGetVersion") }?;
        let mut found = 0;
        // SAFETY: writes one int to the place given.
        let code = Code(unsafe { version(&raw mut found) });
        if code != Code::SUCCESS {
            return Err(DriverError::Call { call: "cuDriverGetVersion", code });
        }
        let version = Version(found);
        if version < VERSION_MIN {
            return Err(DriverError::TooOld { library: path, found: version });
        }
        Ok(Self { loaded, calls: bind(loaded, &path)?, version, library: path })
    }

    /// A function that only some drivers have.
    ///
    /// # Safety
    /// `T` must be the function's type.
    pub(crate) unsafe fn symbol<T: Copy>(&self, name: &'static str) -> Option<T> {
        // SAFETY: by this function's contract.
        unsafe { find(self.loaded, &self.library, name) }.ok()
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The library's name or path, as it was loaded.
    #[must_use]
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Initialises the driver in this process: restore needs it where persistence mode is off. No context is made, so no
    /// device memory is taken.
    ///
    /// # Errors
    /// The driver's refusal, above all where there is no device.
    pub fn init(&self) -> Result<(), DriverError> {
        // SAFETY: takes a number.
        done("cuInit", unsafe { (self.calls.init)(0) })
    }

    /// The devices that the driver shows. [`Driver::init`] comes first.
    ///
    /// # Errors
    /// The driver's refusal.
    pub fn devices(&self) -> Result<Vec<Device>, DriverError> {
        let mut count = 0;
        // SAFETY: writes one int.
        done("cuDeviceGetCount", unsafe { (self.calls.count)(&raw mut count) })?;
        (0..count).map(|index| self.device(index)).collect()
    }

    fn device(&self, index: c_int) -> Result<Device, DriverError> {
        let (mut device, mut uuid, mut total) = (0, Uuid::default(), 0);
        let mut name = [0 as c_char; 128];
        let length = c_int::try_from(name.len()).expect("short");
        // SAFETY: writes one int.
        done("cuDeviceGet", unsafe { (self.calls.get)(&raw mut device, index) })?;
        // SAFETY: writes at most `length` bytes.
        done("cuDeviceGetName", unsafe { (self.calls.name)(name.as_mut_ptr(), length, device) })?;
        // SAFETY: writes 16 bytes.
        done("cuDeviceGetUuid", unsafe { (self.calls.uuid)(&raw mut uuid, device) })?;
        // SAFETY: writes one size_t.
        done("cuDeviceTotalMem", unsafe { (self.calls.total)(&raw mut total, device) })?;
        // The driver ends the name; this holds if it did not.
        name[127] = 0;
        // SAFETY: the buffer has a zero byte.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Device { uuid, name, total_bytes: total as u64 })
    }

    /// The state of a process.
    ///
    /// # Errors
    /// The driver's result.
    pub fn state(&self, pid: i32) -> Result<State, Code> {
        let mut state = u32::MAX;
        // SAFETY: writes one u32.
        checked(unsafe { (self.calls.state)(pid, &raw mut state) })?;
        Ok(State(state))
    }

    /// The thread in a process that carries out restores, in this process's numbers. What uses no CUDA has none.
    ///
    /// # Errors
    /// The driver's result, also where the process does not use CUDA.
    pub fn restore_thread(&self, pid: i32) -> Result<i32, Code> {
        let mut thread = 0;
        // SAFETY: writes one int.
        checked(unsafe { (self.calls.thread)(pid, &raw mut thread) })?;
        Ok(thread)
    }

    /// Carries one step out. `lock_timeout` counts for [`Step::Lock`], `pairs` for [`Step::Restore`]; without pairs
    /// everything goes back to the devices it came from.
    ///
    /// # Errors
    /// The driver's result; the process may be in any state.
    pub fn step(&self, step: Step, pid: i32, lock_timeout: Duration, pairs: &[Pair]) -> Result<(), Code> {
        let code = match step {
            Step::Lock => {
                // Zero would mean to wait for ever.
                let timeout_ms = u32::try_from(lock_timeout.as_millis()).unwrap_or(u32::MAX).max(1);
                let mut args = LockArgs { timeout_ms, ..LockArgs::default() };
                // SAFETY: the structure has the driver's layout and lives until the call returns.
                unsafe { (self.calls.lock)(pid, &raw mut args) }
            }
            Step::Checkpoint => {
                let mut args = NoArgs::default();
                // SAFETY: as above.
                unsafe { (self.calls.checkpoint)(pid, &raw mut args) }
            }
            Step::Restore => {
                let first = if pairs.is_empty() { std::ptr::null() } else { pairs.as_ptr() };
                let count = c_uint::try_from(pairs.len()).expect("bounded by the wire");
                let storage = std::ptr::null_mut();
                let mut args = RestoreArgs { pairs: first, count, pad: 0, storage, reserved: [0; 40] };
                // SAFETY: as above; the pairs live as long.
                unsafe { (self.calls.restore)(pid, &raw mut args) }
            }
            Step::Unlock => {
                let mut args = NoArgs::default();
                // SAFETY: as above.
                unsafe { (self.calls.unlock)(pid, &raw mut args) }
            }
        };
        checked(code)
    }
}

fn checked(code: u32) -> Result<(), Code> {
    if code == 0 { Ok(()) } else { Err(Code(code)) }
}

fn done(call: &'static str, code: u32) -> Result<(), DriverError> {
    checked(code).map_err(|code| DriverError::Call { call, code })
}

fn bind(library: &'static Library, path: &Path) -> Result<Calls, DriverError> {
    macro_rules! symbol {
        ($name:literal) => {{
            // SAFETY: the field's type is the function's type in the driver's header.
            let found = unsafe { find(library, path, $name) };
            found?
        }};
    }
    Ok(Calls {
        init: symbol!("cuInit"),
        count: symbol!("cuDeviceGetCount"),
        get: symbol!("cuDeviceGet"),
        name: symbol!("cuDeviceGetName"),
        uuid: symbol!("cuDeviceGetUuid_v2"),
        total: symbol!("cuDeviceTotalMem_v2"),
        state: symbol!("cuCheckpointProcessGetState"),
        thread: symbol!("cuCheckpointProcessGetRestoreThreadId"),
        lock: symbol!("cuCheckpointProcessLock"),
        checkpoint: symbol!("cuCheckpointProcessCheckpoint"),
        restore: symbol!("cuCheckpointProcessRestore"),
        unlock: symbol!("cuCheckpointProcessUnlock"),
    })
}

/// Looks one function up.
///
/// # Safety
/// `T` must be the function's type.
unsafe fn find<T: Copy>(
    library: &'static Library,
    path: &Path,
    symbol: &'static str,
) -> Result<T, DriverError> {
    // SAFETY: by this function's contract.
    let found = unsafe { library.get::<T>(symbol) };
    found.map(|symbol| *symbol).map_err(|_| DriverError::Symbol { library: path.to_owned(), symbol })
}

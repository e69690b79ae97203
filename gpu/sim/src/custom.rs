//! The caller's side of custom storage (CUDA 13.4): device memory of another process, mapped here device by device, until the
//! caller says that it has copied or filled it.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::caller;
use crate::code;
use crate::device;
use crate::exports::{self, RestoreArgs};
use crate::page::Uuid;
use crate::target;

/// The first version that has it.
const VERSION: c_int = 13_040;
/// Index of the completion in [`crate::page::STEPS`].
const COMPLETE: usize = 4;

/// `CUcheckpointCustomStoragePerDeviceData`.
#[repr(C)]
struct PerDevice {
    pointer: u64,
    bytes: usize,
    stream: *mut c_void,
}

/// `CUcheckpointCustomStorageInfo`.
#[repr(C)]
struct Info {
    handle: u64,
    devices: *mut PerDevice,
    count: c_uint,
}

/// One operation that was begun.
struct Operation {
    pid: i32,
    /// Device, address and length.
    mapped: Vec<(Uuid, usize, usize)>,
}

static OPERATIONS: Mutex<BTreeMap<u64, Operation>> = Mutex::new(BTreeMap::new());
/// Contexts that the caller has taken and not given back.
pub(crate) static RETAINED: AtomicUsize = AtomicUsize::new(0);

fn operations() -> MutexGuard<'static, BTreeMap<u64, Operation>> {
    OPERATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether these addresses are device memory of another process that was mapped here.
pub(crate) fn has_mapped(address: usize, bytes: usize) -> bool {
    let inside =
        |(_, start, length): &(Uuid, usize, usize)| *start <= address && address + bytes <= start + length;
    operations().values().any(|operation| operation.mapped.iter().any(inside))
}

/// The number of the device whose memory lies there.
fn device_at(address: usize) -> Option<usize> {
    let operations = operations();
    let mut all = operations.values().flat_map(|operation| &operation.mapped);
    let (uuid, ..) = all.find(|(_, start, length)| (*start..start + length).contains(&address))?;
    device::all().iter().position(|device| device.uuid == *uuid)
}

/// Maps one device's pieces one behind the other. What was mapped stays until the process ends if this fails.
pub(crate) fn map(pid: i32, pieces: &[(i32, usize)]) -> Result<(usize, usize), u32> {
    let total: usize = pieces.iter().map(|(_, bytes)| bytes).sum();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(code::OUT_OF_MEMORY);
    }
    let start = start.expose_provenance();
    let mut at = start;
    for (fd, bytes) in pieces {
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|_| code::OPERATING_SYSTEM)?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        let place = std::ptr::with_exposed_provenance_mut(at);
        // SAFETY: within the range that was just taken.
        let got = unsafe { libc::mmap(place, *bytes, protection, flags, file.as_raw_fd(), 0) };
        if got == libc::MAP_FAILED {
            return Err(code::OPERATING_SYSTEM);
        }
        at += bytes;
    }
    Ok((start, total))
}

/// Maps what a process has left to us, and tells of it. The list lives as long as this process.
fn open(pid: i32) -> Result<*mut Info, u32> {
    let mut devices: Vec<(Uuid, Vec<(i32, usize)>)> = Vec::new();
    for piece in caller::pieces(pid)? {
        let bytes = usize::try_from(piece.bytes).map_err(|_| code::INVALID_VALUE)?;
        match devices.last_mut().filter(|(device, _)| *device == piece.device) {
            Some((_, pieces)) => pieces.push((piece.fd, bytes)),
            None => devices.push((piece.device, vec![(piece.fd, bytes)])),
        }
    }
    let mapped = devices.iter().map(|(device, pieces)| {
        let (start, bytes) = map(pid, pieces)?;
        Ok((*device, start, bytes))
    });
    let mapped: Vec<(Uuid, usize, usize)> = mapped.collect::<Result<_, u32>>()?;
    let list = mapped.iter().map(|&(_, start, bytes)| PerDevice {
        pointer: start as u64,
        bytes,
        stream: std::ptr::null_mut(),
    });
    let list = Box::leak(list.collect::<Box<[_]>>());
    let count = c_uint::try_from(list.len()).unwrap_or(c_uint::MAX);
    let mut operations = operations();
    let handle = operations.keys().next_back().map_or(1, |last| last + 1);
    operations.insert(handle, Operation { pid, mapped });
    Ok(Box::leak(Box::new(Info { handle, devices: list.as_mut_ptr(), count })))
}

/// What the driver asks of the caller before it begins.
fn allowed(pid: c_int) -> Result<(), u32> {
    if pid.unsigned_abs() == std::process::id() {
        return Err(code::NOT_SUPPORTED);
    }
    if RETAINED.load(Ordering::SeqCst) < device::all().len() { Err(code::INVALID_CONTEXT) } else { Ok(()) }
}

/// `cuCheckpointProcessCheckpoint` of CUDA 13.4: the first word of the arguments is where the list is wanted.
unsafe extern "C" fn checkpoint(pid: c_int, args: *const [u64; 8]) -> u32 {
    // SAFETY: as the header asks: null or 64 bytes.
    let Some(args) = (unsafe { args.as_ref() }).filter(|args| args[0] != 0) else {
        // SAFETY: as the header asks.
        let refused = unsafe { exports::reserved(args.cast()) };
        return refused.unwrap_or_else(|| caller::step(1, pid, 0, &[], false));
    };
    if args[1..].iter().any(|word| *word != 0) {
        return code::INVALID_VALUE;
    }
    let begun = allowed(pid).and_then(|()| match caller::step(1, pid, 0, &[], true) {
        code::SUCCESS => open(pid),
        code => Err(code),
    });
    tell(args[0], begun)
}

/// `cuCheckpointProcessRestore` of CUDA 13.4.
unsafe extern "C" fn restore(pid: c_int, args: *const RestoreArgs) -> u32 {
    // SAFETY: as the header asks: null or 64 bytes.
    let Some(args) = (unsafe { args.as_ref() }) else { return caller::step(2, pid, 0, &[], false) };
    if args.custom == 0 {
        return exports::restore(pid, args, false);
    }
    let begun = allowed(pid).and_then(|()| match exports::restore(pid, args, true) {
        code::SUCCESS => open(pid),
        code => Err(code),
    });
    tell(args.custom, begun)
}

fn tell(out: u64, begun: Result<*mut Info, u32>) -> u32 {
    let Ok(address) = usize::try_from(out) else { return code::INVALID_VALUE };
    let out: *mut *mut Info = std::ptr::with_exposed_provenance_mut(address);
    match begun {
        // SAFETY: the header asks for a place for one pointer.
        Ok(info) => unsafe { out.write(info) },
        Err(code) => return code,
    }
    code::SUCCESS
}

/// `cuCheckpointOperationComplete`.
extern "C" fn complete(handle: u64) -> u32 {
    let Some(operation) = operations().remove(&handle) else { return code::INVALID_VALUE };
    for (_, start, bytes) in operation.mapped {
        // SAFETY: mapped for this operation, which has ended.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), bytes) };
    }
    caller::step(COMPLETE, operation.pid, 0, &[], false)
}

/// The versions of functions that came with CUDA 13.4; an older driver has none.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetProcAddress_v2(
    name: *const c_char,
    out: *mut *const c_void,
    version: c_int,
    _: u64,
    _: *mut c_uint,
) -> u32 {
    if version > exports::version() || version < VERSION {
        return code::INVALID_VALUE;
    }
    // SAFETY: as the header asks: a text with its end.
    let found = match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"cuCheckpointProcessCheckpoint" => checkpoint as *const c_void,
        b"cuCheckpointProcessRestore" => restore as *const c_void,
        b"cuCheckpointOperationComplete" => complete as *const c_void,
        _ => return code::INVALID_VALUE,
    };
    // SAFETY: as the header asks.
    unsafe { out.write(found) };
    code::SUCCESS
}

/// Only the ordinal of the device (9) of memory that was mapped here.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuPointerGetAttribute(out: *mut c_int, attribute: c_uint, pointer: u64) -> u32 {
    let number = usize::try_from(pointer).ok().and_then(device_at).filter(|_| attribute == 9);
    let Some(number) = number else { return code::INVALID_VALUE };
    // SAFETY: as the header asks.
    unsafe { out.write(c_int::try_from(number).unwrap_or(c_int::MAX)) };
    code::SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(number: c_int) -> u32 {
    let released = RETAINED.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1));
    if released == Ok(1) {
        target::end_context();
    }
    match exports::device_of(number) {
        Ok(_) if released.is_ok() => code::SUCCESS,
        Ok(_) => code::INVALID_CONTEXT,
        Err(code) => code,
    }
}

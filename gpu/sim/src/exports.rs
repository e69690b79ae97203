//! The functions of `libcuda.so.1` that are simulated, with the names and types of the driver's header.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::Ordering;

use crate::caller::{self, INITIALIZED};
use crate::device::{self, Device};
use crate::page::{PAIRS_MAX, Uuid};
use crate::target::{self, refused, virtual_memory};
use crate::{VERSION_ENV, code};

pub(crate) fn version() -> c_int {
    std::env::var(VERSION_ENV).ok().and_then(|text| text.parse().ok()).unwrap_or(13_000)
}

pub(crate) fn device_of(number: c_int) -> Result<Device, u32> {
    let index = usize::try_from(number).map_err(|_| code::INVALID_DEVICE)?;
    device::all().into_iter().nth(index).ok_or(code::INVALID_DEVICE)
}

/// Writes what a call gives, or passes its result on.
///
/// # Safety
/// `out` must be valid for a write.
unsafe fn give<T>(out: *mut T, value: Result<T, u32>) -> u32 {
    match value {
        // SAFETY: by this function's contract.
        Ok(value) => unsafe { out.write(value) },
        Err(code) => return code,
    }
    code::SUCCESS
}

// In each of the following the caller gives pointers as the driver's header asks for them.

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> u32 {
    let attach = |_| {
        INITIALIZED.store(true, Ordering::SeqCst);
        if device::all().is_empty() { Err(code::NO_DEVICE) } else { Ok(0) }
    };
    caller::follow("init", 0, attach).err().unwrap_or(code::SUCCESS)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(out: *mut c_int) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, Ok(version())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(out: *mut c_int) -> u32 {
    let count = |_| Ok(u32::try_from(device::all().len()).unwrap_or(u32::MAX));
    let count = caller::follow("devices", 0, count);
    // SAFETY: as the header asks.
    unsafe { give(out, count.map(|count| c_int::try_from(count).unwrap_or(c_int::MAX))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(out: *mut c_int, number: c_int) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, device_of(number).map(|_| number)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(out: *mut c_char, length: c_int, number: c_int) -> u32 {
    let device = match device_of(number) {
        Ok(device) => device,
        Err(code) => return code,
    };
    // SAFETY: as the header asks.
    unsafe { write_text(out, length.unsigned_abs() as usize, &device.name) }
}

/// Writes text with its end, cut to the room there is.
///
/// # Safety
/// `out` must have room for `length` bytes.
pub(crate) unsafe fn write_text(out: *mut c_char, length: usize, text: &str) -> u32 {
    if length == 0 {
        return code::INVALID_VALUE;
    }
    let count = text.len().min(length - 1);
    // SAFETY: at most `length - 1` bytes.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), out.cast(), count) };
    // SAFETY: within `length`.
    unsafe { out.add(count).write(0) };
    code::SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(out: *mut Uuid, number: c_int) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, device_of(number).map(|device| device.uuid)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(out: *mut usize, number: c_int) -> u32 {
    let total = device_of(number).and_then(|device| device.memory().map_err(|_| code::NO_DEVICE));
    // SAFETY: as the header asks.
    unsafe { give(out, total.map(|(total, _)| usize::try_from(total).unwrap_or(usize::MAX))) }
}

/// The context of this library belongs to the process and to all its devices.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(out: *mut *mut c_void, number: c_int) -> u32 {
    if !INITIALIZED.load(Ordering::SeqCst) {
        return code::NOT_INITIALIZED;
    }
    let made = device_of(number).and_then(|_| match target::context() {
        // The device's number and one.
        code::SUCCESS => {
            crate::custom::RETAINED.fetch_add(1, Ordering::SeqCst);
            Ok(std::ptr::without_provenance_mut(number.unsigned_abs() as usize + 1))
        }
        code => Err(code),
    });
    // SAFETY: as the header asks.
    unsafe { give(out, made) }
}

thread_local! {
    static CURRENT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> u32 {
    match context.addr().checked_sub(1) {
        Some(number) => {
            CURRENT.set(number);
            code::SUCCESS
        }
        None => code::INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    target::synchronize();
    code::SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32 {
    let number = c_int::try_from(CURRENT.get()).unwrap_or(c_int::MAX);
    let found = device_of(number).and_then(|device| device.memory().map_err(|_| code::NO_DEVICE));
    let (all, left) = match found {
        Ok(found) => found,
        Err(code) => return code,
    };
    // SAFETY: as the header asks.
    unsafe { give(total, Ok(usize::try_from(all).unwrap_or(usize::MAX))) };
    // SAFETY: as the header asks.
    unsafe { give(free, Ok(usize::try_from(left).unwrap_or(usize::MAX))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(out: *mut u64, bytes: usize) -> u32 {
    let address = target::allocate(CURRENT.get(), bytes);
    // SAFETY: as the header asks.
    unsafe { give(out, address.map(|address| address as u64)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    usize::try_from(address).map_or(code::INVALID_VALUE, target::free)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(device: u64, host: *const c_void, bytes: usize) -> u32 {
    let device = usize::try_from(device).unwrap_or(0);
    // SAFETY: as the header asks; the host memory is only read in this direction.
    unsafe { target::copy(device, host.cast_mut().cast(), bytes, false) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoH_v2(host: *mut c_void, device: u64, bytes: usize) -> u32 {
    let device = usize::try_from(device).unwrap_or(0);
    // SAFETY: as the header asks.
    unsafe { target::copy(device, host.cast(), bytes, true) }
}

/// `CUmemAllocationProp`, as far as it counts: the number of the device.
#[repr(C)]
struct AllocationProp {
    kind: c_uint,
    handle_types: c_uint,
    location_kind: c_uint,
    location: c_int,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetAllocationGranularity(
    out: *mut usize,
    _: *const AllocationProp,
    _: c_uint,
) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, Ok(device::GRANULE)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAddressReserve(out: *mut u64, bytes: usize, _: usize, _: u64, _: u64) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, virtual_memory::reserve(bytes).map(|address| address as u64)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> u32 {
    usize::try_from(address).map_or(code::INVALID_VALUE, |address| virtual_memory::unreserve(address, bytes))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemCreate(
    out: *mut u64,
    bytes: usize,
    properties: *const AllocationProp,
    _: u64,
) -> u32 {
    // SAFETY: as the header asks.
    let Some(properties) = (unsafe { properties.as_ref() }) else { return code::INVALID_VALUE };
    let number = usize::try_from(properties.location).map_err(|_| code::INVALID_DEVICE);
    // SAFETY: as the header asks.
    unsafe { give(out, number.and_then(|number| virtual_memory::create(number, bytes))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemRelease(handle: u64) -> u32 {
    virtual_memory::release(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, _: u64) -> u32 {
    match usize::try_from(address) {
        Ok(address) if offset == 0 => virtual_memory::map(address, bytes, handle),
        _ => code::INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> u32 {
    usize::try_from(address).map_or(code::INVALID_VALUE, |address| virtual_memory::unmap(address, bytes))
}

/// Mapped memory can be used at once here.
#[unsafe(no_mangle)]
extern "C" fn cuMemSetAccess(_: u64, _: usize, _: *const c_void, _: usize) -> u32 {
    code::SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocManaged(out: *mut u64, bytes: usize, _: c_uint) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, refused::managed(CURRENT.get(), bytes).map(|address| address as u64)) }
}

/// `CUipcMemHandle`, which is passed by value.
#[repr(C)]
struct IpcMemHandle(refused::IpcHandle);

#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcGetMemHandle(out: *mut IpcMemHandle, address: u64) -> u32 {
    let handle = usize::try_from(address).map_err(|_| code::INVALID_VALUE).and_then(refused::share);
    // SAFETY: as the header asks.
    unsafe { give(out, handle.map(IpcMemHandle)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcOpenMemHandle_v2(out: *mut u64, handle: IpcMemHandle, _: c_uint) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, refused::open(&handle.0).map(|address| address as u64)) }
}

/// In place of `cuLaunchKernel`: a kernel that only takes time.
#[unsafe(no_mangle)]
extern "C" fn rewarmSimLaunch(ms: u64) -> u32 {
    target::launch(ms);
    code::SUCCESS
}

/// How often a restore found memory of the program in the place of a device range.
#[unsafe(no_mangle)]
extern "C" fn rewarmSimClobbered() -> u32 {
    target::clobbered()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessGetState(pid: c_int, out: *mut u32) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, caller::state(pid)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessGetRestoreThreadId(pid: c_int, out: *mut c_int) -> u32 {
    // SAFETY: as the header asks.
    unsafe { give(out, caller::restore_thread(pid).map(u32::cast_signed)) }
}

/// The first field is the lock's timeout; all other bytes must be zero.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessLock(pid: c_int, args: *const [u32; 16]) -> u32 {
    // SAFETY: as the header asks: null or 64 bytes.
    let args = unsafe { args.as_ref() }.copied().unwrap_or_default();
    if args[1..].iter().any(|word| *word != 0) {
        return code::INVALID_VALUE;
    }
    // Zero is to wait for ever.
    let timeout = if args[0] == 0 { u32::MAX } else { args[0] };
    caller::step(0, pid, timeout, &[], false)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessCheckpoint(pid: c_int, args: *const [u32; 16]) -> u32 {
    // SAFETY: as the header asks.
    unsafe { reserved(args) }.unwrap_or_else(|| caller::step(1, pid, 0, &[], false))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessUnlock(pid: c_int, args: *const [u32; 16]) -> u32 {
    // SAFETY: as the header asks.
    unsafe { reserved(args) }.unwrap_or_else(|| caller::step(3, pid, 0, &[], false))
}

/// The refusal of arguments that are not all zero.
pub(crate) unsafe fn reserved(args: *const [u32; 16]) -> Option<u32> {
    // SAFETY: null or 64 bytes.
    let args = unsafe { args.as_ref() }?;
    args.iter().any(|word| *word != 0).then_some(code::INVALID_VALUE)
}

/// `CUcheckpointRestoreArgs` of CUDA 13.
#[repr(C)]
pub(crate) struct RestoreArgs {
    pairs: *const [Uuid; 2],
    count: c_uint,
    pad: c_uint,
    /// Custom storage, known from CUDA 13.4 on.
    pub(crate) custom: u64,
    rest: [u32; 10],
}
const _: () = assert!(size_of::<RestoreArgs>() == 64);

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCheckpointProcessRestore(pid: c_int, args: *const RestoreArgs) -> u32 {
    // SAFETY: as the header asks: null or 64 bytes.
    let Some(args) = (unsafe { args.as_ref() }) else { return caller::step(2, pid, 0, &[], false) };
    match args.custom {
        0 => restore(pid, args, false),
        _ => code::INVALID_VALUE,
    }
}

/// The restore of either version of the function.
pub(crate) fn restore(pid: c_int, args: &RestoreArgs, custom: bool) -> u32 {
    let count = args.count as usize;
    let malformed = args.pad != 0 || args.rest.iter().any(|word| *word != 0) || count > PAIRS_MAX;
    // A driver of R570 knows no pairs: to it these bytes are reserved.
    if malformed || (count > 0 && (args.pairs.is_null() || version() < 13_000)) {
        return code::INVALID_VALUE;
    }
    let pairs = match count {
        0 => &[][..],
        // SAFETY: the header asks for that many pairs.
        count => unsafe { std::slice::from_raw_parts(args.pairs, count) },
    };
    caller::step(2, pid, 0, pairs, custom)
}

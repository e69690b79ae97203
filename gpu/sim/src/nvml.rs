//! The functions of `libnvidia-ml.so.1` that are simulated: what asks about devices without a context.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::caller;
use crate::device::{self, Device};
use crate::exports::write_text;

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 2;
const NOT_SUPPORTED: c_int = 3;
const INSUFFICIENT_SIZE: c_int = 7;
const VERSION_MISMATCH: c_int = 25;

/// `nvmlMemory_v2_t`.
#[repr(C)]
struct Memory {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlProcessInfo_v2_t`.
#[repr(C)]
struct ProcessInfo {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

fn device_of(handle: *mut c_void) -> Option<Device> {
    device::all().into_iter().nth(handle.addr().checked_sub(1)?)
}

fn write(out: *mut c_char, length: c_uint, text: &str) -> c_int {
    // SAFETY: callers give a buffer of that length, as the header asks.
    if unsafe { write_text(out, length as usize, text) } == 0 { SUCCESS } else { INVALID_ARGUMENT }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> c_int {
    let release = std::env::var(crate::RELEASE_ENV);
    write(out, length, &release.unwrap_or_else(|_| "580.0 (simulated)".to_owned()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> c_int {
    let count = |_| Ok(c_uint::try_from(device::all().len()).unwrap_or(0));
    match caller::follow("machine", 0, count) {
        // SAFETY: as the header asks.
        Ok(count) => unsafe { out.write(count) },
        Err(code) => return c_int::try_from(code).unwrap_or(c_int::MAX),
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, out: *mut *mut c_void) -> c_int {
    let handle = std::ptr::without_provenance_mut(index as usize + 1);
    if device_of(handle).is_none() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: as the header asks.
    unsafe { out.write(handle) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetName(handle: *mut c_void, out: *mut c_char, length: c_uint) -> c_int {
    device_of(handle).map_or(INVALID_ARGUMENT, |device| write(out, length, &device.name))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetUUID(handle: *mut c_void, out: *mut c_char, length: c_uint) -> c_int {
    let Some(device) = device_of(handle) else { return INVALID_ARGUMENT };
    let digits = format!("{:032x}", u128::from_be_bytes(device.uuid));
    let (a, b, c, d, e) = (&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]);
    write(out, length, &format!("GPU-{a}-{b}-{c}-{d}-{e}"))
}

/// The version field of the second form: its size and the number 2.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: *mut c_void, out: *mut Memory) -> c_int {
    let Some((total, free)) = device_of(handle).and_then(|device| device.memory().ok()) else {
        return INVALID_ARGUMENT;
    };
    // SAFETY: as the header asks.
    let version = unsafe { (&raw const (*out).version).read() };
    if version as usize != size_of::<Memory>() | 2 << 24 {
        return VERSION_MISMATCH;
    }
    // SAFETY: as the header asks.
    unsafe { out.write(Memory { version, total, reserved: 0, free, used: total - free }) };
    SUCCESS
}

/// Bytes that each process of this machine has on a device.
fn used_by(device: &Device) -> Vec<ProcessInfo> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<c_uint>().ok());
    let info = |pid| {
        let used = device.used_by(pid);
        (used > 0).then_some(ProcessInfo {
            pid,
            used,
            gpu_instance: c_uint::MAX,
            compute_instance: c_uint::MAX,
        })
    };
    pids.filter_map(info).collect()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: *mut c_void,
    count: *mut c_uint,
    out: *mut ProcessInfo,
) -> c_int {
    let Some(device) = device_of(handle) else { return INVALID_ARGUMENT };
    let found = used_by(&device);
    // SAFETY: as the header asks.
    let room = unsafe { count.read() } as usize;
    // SAFETY: as the header asks.
    unsafe { count.write(c_uint::try_from(found.len()).unwrap_or(c_uint::MAX)) };
    if found.len() > room {
        return INSUFFICIENT_SIZE;
    }
    for (index, info) in found.into_iter().enumerate() {
        // SAFETY: the header asks for room for that many.
        unsafe { out.add(index).write(info) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPersistenceMode(handle: *mut c_void, out: *mut c_int) -> c_int {
    if device_of(handle).is_none() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: as the header asks.
    unsafe { out.write(c_int::from(std::env::var_os(crate::PERSISTENCE_ENV).is_some())) };
    SUCCESS
}

/// As on hardware that has no MIG, unless the device's folder has a file `mig`.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMigMode(
    handle: *mut c_void,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> c_int {
    if !device_of(handle).is_some_and(|device| device.folder.join("mig").exists()) {
        return NOT_SUPPORTED;
    }
    // SAFETY: as the header asks.
    unsafe { current.write(1) };
    // SAFETY: as the header asks.
    unsafe { pending.write(1) };
    SUCCESS
}

/// Bare metal, or a vGPU where the device's folder has a file `vgpu`.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetVirtualizationMode(handle: *mut c_void, out: *mut c_uint) -> c_int {
    let Some(device) = device_of(handle) else { return INVALID_ARGUMENT };
    // SAFETY: as the header asks.
    unsafe { out.write(if device.folder.join("vgpu").exists() { 2 } else { 0 }) };
    SUCCESS
}

//! The functions of `libnvidia-ml.so.1` that are simulated: what asks about devices without a context.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::device::{self, Device};
use crate::exports::write_text;

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 2;
const NOT_SUPPORTED: c_int = 3;

/// `nvmlMemory_t`.
#[repr(C)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
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
    write(out, length, "580.0 (simulated)")
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> c_int {
    // SAFETY: as the header asks.
    unsafe { out.write(c_uint::try_from(device::all().len()).unwrap_or(0)) };
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

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo(handle: *mut c_void, out: *mut Memory) -> c_int {
    let Some((total, free)) = device_of(handle).and_then(|device| device.memory().ok()) else {
        return INVALID_ARGUMENT;
    };
    // SAFETY: as the header asks.
    unsafe { out.write(Memory { total, free, used: total - free }) };
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

/// As on hardware that has no MIG.
#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMigMode(_: *mut c_void, _: *mut c_uint, _: *mut c_uint) -> c_int {
    NOT_SUPPORTED
}

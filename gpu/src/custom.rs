//! Custom storage, which drivers have from CUDA 13.4 (R615) on: the driver leaves the device memory of a process to the caller, who
//! moves it where it wants, and no copy is made in the process.
//!
//! A checkpoint or restore is begun, the driver tells for each device where the memory lies and how long it is, the caller
//! copies it away or fills it, and says that it is done. In between the process is in a state of its own from which nothing
//! else leads on: what fails there leaves the process to be killed.
//!
//! Only the helper process may use this.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::driver::{Code, Driver, Version};
use crate::topology::{Device, Pair, Uuid};

/// The first driver that has it (R615).
pub const VERSION_MIN: Version = Version(13_040);
/// Bytes that are moved at a time.
const STEP: usize = 8 << 20;
/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`.
const DEVICE_ORDINAL: c_uint = 9;

/// Device memory of a process on one device, and where it was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The device.
    pub gpu: Uuid,
    /// Where it begins in the file it was written to.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// Why device memory was not moved.
#[derive(Debug, thiserror::Error)]
pub enum CustomError {
    /// The driver refused.
    #[error("{call}: {code}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: Code,
    },
    /// The driver has no custom storage.
    #[error(
        "device memory can be moved past the process from CUDA {VERSION_MIN} (R615) on, the driver has {found}"
    )]
    TooOld {
        /// Its version.
        found: Version,
    },
    /// What was kept is not what the driver wants back.
    #[error("the driver wants {wanted} bytes of device memory for {gpu}, the snapshot has {kept}")]
    Length {
        /// The device, as it was at the checkpoint.
        gpu: Uuid,
        /// What the driver wants.
        wanted: u64,
        /// What there is.
        kept: u64,
    },
    /// The file or the stream.
    #[error("{action} device memory at byte {at}: {reason}")]
    Io {
        /// What was done.
        action: &'static str,
        /// How much had been moved.
        at: u64,
        /// What the kernel said.
        reason: io::Error,
    },
}

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
    devices: *const PerDevice,
    count: c_uint,
}

#[repr(C)]
struct CheckpointArgs {
    out: *mut *const Info,
    reserved: [u8; 56],
}

#[repr(C)]
struct RestoreArgs {
    pairs: *const Pair,
    count: c_uint,
    pad: c_uint,
    out: *mut *const Info,
    reserved: [u8; 40],
}

const _: () = assert!(size_of::<CheckpointArgs>() == 64 && size_of::<RestoreArgs>() == 64);

type Checkpoint = unsafe extern "C" fn(c_int, *mut CheckpointArgs) -> u32;
type Restore = unsafe extern "C" fn(c_int, *mut RestoreArgs) -> u32;
type Complete = unsafe extern "C" fn(u64) -> u32;
type GetProc = unsafe extern "C" fn(*const c_char, *mut *const c_void, c_int, u64, *mut c_uint) -> u32;

/// The functions of it.
#[derive(Debug, Clone, Copy)]
pub struct Custom {
    checkpoint: Checkpoint,
    restore: Restore,
    complete: Complete,
    retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> u32,
    release: unsafe extern "C" fn(c_int) -> u32,
    set_current: unsafe extern "C" fn(*mut c_void) -> u32,
    attribute: unsafe extern "C" fn(*mut c_int, c_uint, u64) -> u32,
    to_host: unsafe extern "C" fn(*mut c_void, u64, usize) -> u32,
    to_device: unsafe extern "C" fn(u64, *const c_void, usize) -> u32,
}

impl Custom {
    /// Looks the functions up.
    ///
    /// # Errors
    /// A driver that is too old.
    pub fn of(driver: &Driver) -> Result<Self, CustomError> {
        Self::find(driver).ok_or(CustomError::TooOld { found: driver.version() })
    }

    fn find(driver: &Driver) -> Option<Self> {
        if driver.version() < VERSION_MIN {
            return None;
        }
        // SAFETY: the types here and below are those of the driver's header.
        let get: GetProc = unsafe { driver.symbol("cuGetProcAddress_v2") }?;
        // The plain symbol would be the oldest version of a function, which knows nothing of this.
        let new = |name: &CStr| {
            let (mut found, mut status) = (std::ptr::null(), 0);
            // SAFETY: writes one pointer and one number.
            let code = unsafe { get(name.as_ptr(), &raw mut found, VERSION_MIN.0, 0, &raw mut status) };
            (code == 0 && !found.is_null()).then_some(found)
        };
        let checkpoint = new(c"cuCheckpointProcessCheckpoint")?;
        let restore = new(c"cuCheckpointProcessRestore")?;
        let complete = new(c"cuCheckpointOperationComplete")?;
        Some(Self {
            // SAFETY: the driver's function of that name and version.
            checkpoint: unsafe { std::mem::transmute::<*const c_void, Checkpoint>(checkpoint) },
            // SAFETY: as above.
            restore: unsafe { std::mem::transmute::<*const c_void, Restore>(restore) },
            // SAFETY: as above.
            complete: unsafe { std::mem::transmute::<*const c_void, Complete>(complete) },
            // SAFETY: as above.
            retain: unsafe { driver.symbol("cuDevicePrimaryCtxRetain") }?,
            // SAFETY: as above.
            release: unsafe { driver.symbol("cuDevicePrimaryCtxRelease_v2") }?,
            // SAFETY: as above.
            set_current: unsafe { driver.symbol("cuCtxSetCurrent") }?,
            // SAFETY: as above.
            attribute: unsafe { driver.symbol("cuPointerGetAttribute") }?,
            // SAFETY: as above.
            to_host: unsafe { driver.symbol("cuMemcpyDtoH_v2") }?,
            // SAFETY: as above.
            to_device: unsafe { driver.symbol("cuMemcpyHtoD_v2") }?,
        })
    }

    /// Checkpoints a locked process and writes its device memory to `file` from `offset` on.
    ///
    /// # Errors
    /// [`CustomError`]; the process may then be in a state from which nothing leads back.
    pub fn store(
        &self,
        devices: &[Device],
        pid: i32,
        file: &File,
        offset: u64,
    ) -> Result<Vec<Part>, CustomError> {
        let contexts = Contexts::retain(self, devices.len())?;
        let mut out = std::ptr::null();
        let mut args = CheckpointArgs { out: &raw mut out, reserved: [0; 56] };
        // SAFETY: the structure has the driver's layout and lives, as the place it names, until the call returns.
        done("cuCheckpointProcessCheckpoint", unsafe { (self.checkpoint)(pid, &raw mut args) })?;
        let memory = Memory::of(self, out, devices)?;
        let (mut parts, mut at) = (Vec::new(), offset);
        let mut buffer = vec![0; STEP];
        for one in &memory.devices {
            contexts.make_current(one.ordinal)?;
            parts.push(Part { gpu: one.gpu, offset: at, bytes: one.bytes });
            for (from, count) in steps(one.bytes) {
                let to = buffer.as_mut_ptr().cast();
                // SAFETY: the buffer has so many bytes; the driver checks its own side.
                done("cuMemcpyDtoH", unsafe { (self.to_host)(to, one.pointer + from, count) })?;
                let written = file.write_all_at(&buffer[..count], at);
                written.map_err(|reason| CustomError::Io { action: "keep", at, reason })?;
                at += count as u64;
            }
        }
        // SAFETY: the handle of this operation.
        done("cuCheckpointOperationComplete", unsafe { (self.complete)(memory.handle) })?;
        Ok(parts)
    }

    /// Restores a process whose device memory comes from `from`: `parts` one behind the other, which is what was kept of it.
    ///
    /// # Errors
    /// [`CustomError`]; the process may then be in a state from which nothing leads back.
    pub fn load(
        &self,
        devices: &[Device],
        pid: i32,
        mut from: impl Read,
        parts: &[Part],
        pairs: &[Pair],
    ) -> Result<(), CustomError> {
        let contexts = Contexts::retain(self, devices.len())?;
        let mut out = std::ptr::null();
        let mut args = RestoreArgs {
            pairs: if pairs.is_empty() { std::ptr::null() } else { pairs.as_ptr() },
            count: c_uint::try_from(pairs.len()).expect("bounded by the wire"),
            pad: 0,
            out: &raw mut out,
            reserved: [0; 40],
        };
        // SAFETY: as above; the pairs live as long.
        done("cuCheckpointProcessRestore", unsafe { (self.restore)(pid, &raw mut args) })?;
        let memory = Memory::of(self, out, devices)?;
        let (mut buffer, mut at) = (vec![0; STEP], 0);
        if let Some(extra) = memory.devices.iter().find(|one| places(parts, pairs, one.gpu).is_none()) {
            return Err(CustomError::Length { gpu: extra.gpu, wanted: extra.bytes, kept: 0 });
        }
        for part in parts {
            let here = memory.devices.iter().find(|one| place(part, pairs) == one.gpu);
            let wanted = here.map_or(0, |one| one.bytes);
            let Some(one) = here.filter(|one| one.bytes == part.bytes) else {
                return Err(CustomError::Length { gpu: part.gpu, wanted, kept: part.bytes });
            };
            contexts.make_current(one.ordinal)?;
            for (to, count) in steps(one.bytes) {
                let read = from.read_exact(&mut buffer[..count]);
                read.map_err(|reason| CustomError::Io { action: "get", at, reason })?;
                // SAFETY: the buffer has so many bytes; the driver checks its own side.
                let code = unsafe { (self.to_device)(one.pointer + to, buffer.as_ptr().cast(), count) };
                done("cuMemcpyHtoD", code)?;
                at += count as u64;
            }
        }
        // SAFETY: the handle of this operation.
        done("cuCheckpointOperationComplete", unsafe { (self.complete)(memory.handle) })
    }
}

/// Where a part goes.
fn place(part: &Part, pairs: &[Pair]) -> Uuid {
    pairs.iter().find(|pair| pair.old == part.gpu).map_or(part.gpu, |pair| pair.new)
}

/// The part that goes to a device.
fn places<'a>(parts: &'a [Part], pairs: &[Pair], gpu: Uuid) -> Option<&'a Part> {
    parts.iter().find(|part| place(part, pairs) == gpu)
}

/// Offsets and lengths of so many bytes, cut.
fn steps(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes).step_by(STEP).map(move |at| (at, usize::try_from(bytes - at).unwrap_or(STEP).min(STEP)))
}

/// What the driver has left to us.
struct Memory {
    handle: u64,
    devices: Vec<OnDevice>,
}

struct OnDevice {
    gpu: Uuid,
    ordinal: usize,
    pointer: u64,
    bytes: u64,
}

impl Memory {
    fn of(custom: &Custom, info: *const Info, devices: &[Device]) -> Result<Self, CustomError> {
        let nothing = CustomError::Call { call: "custom storage", code: Code::INVALID_VALUE };
        // SAFETY: the driver wrote where its list lies, or nothing.
        let Some(info) = (unsafe { info.as_ref() }) else { return Err(nothing) };
        let list = match info.count {
            0 => &[][..],
            // SAFETY: the list has that many entries and lives until the operation is completed.
            count => unsafe { std::slice::from_raw_parts(info.devices, count as usize) },
        };
        let mut found = Vec::new();
        for one in list {
            let mut ordinal = -1;
            // SAFETY: writes one number.
            let code = unsafe { (custom.attribute)(&raw mut ordinal, DEVICE_ORDINAL, one.pointer) };
            done("cuPointerGetAttribute", code)?;
            let ordinal = usize::try_from(ordinal).unwrap_or(usize::MAX);
            let device = devices.get(ordinal);
            let Some(device) = device else {
                return Err(CustomError::Call { call: "cuPointerGetAttribute", code: Code::INVALID_VALUE });
            };
            let (pointer, bytes) = (one.pointer, one.bytes as u64);
            found.push(OnDevice { gpu: device.uuid, ordinal, pointer, bytes });
        }
        Ok(Self { handle: info.handle, devices: found })
    }
}

/// Contexts of all devices, which the driver asks for; they take device memory, so only for the time of an operation.
struct Contexts<'a> {
    custom: &'a Custom,
    all: Vec<*mut c_void>,
}

impl<'a> Contexts<'a> {
    fn retain(custom: &'a Custom, count: usize) -> Result<Self, CustomError> {
        let mut contexts = Self { custom, all: Vec::new() };
        for ordinal in 0..count {
            let mut context = std::ptr::null_mut();
            let number = c_int::try_from(ordinal).expect("few");
            // SAFETY: writes one pointer.
            let code = unsafe { (custom.retain)(&raw mut context, number) };
            done("cuDevicePrimaryCtxRetain", code)?;
            contexts.all.push(context);
        }
        Ok(contexts)
    }

    fn make_current(&self, ordinal: usize) -> Result<(), CustomError> {
        // SAFETY: a context that is held.
        done("cuCtxSetCurrent", unsafe { (self.custom.set_current)(self.all[ordinal]) })
    }
}

impl Drop for Contexts<'_> {
    fn drop(&mut self) {
        for ordinal in 0..self.all.len() {
            // SAFETY: retained once above. What fails shows as device memory that this process has.
            unsafe { (self.custom.release)(c_int::try_from(ordinal).expect("few")) };
        }
    }
}

fn done(call: &'static str, code: u32) -> Result<(), CustomError> {
    if code == 0 { Ok(()) } else { Err(CustomError::Call { call, code: Code(code) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_everything_once() {
        let step = STEP as u64;
        assert_eq!(steps(0).count(), 0);
        assert_eq!(steps(1).collect::<Vec<_>>(), [(0, 1)]);
        assert_eq!(steps(step).collect::<Vec<_>>(), [(0, STEP)]);
        assert_eq!(steps(2 * step + 5).collect::<Vec<_>>(), [(0, STEP), (step, STEP), (2 * step, 5)]);
    }

    #[test]
    fn a_part_goes_where_the_map_says() {
        let uuid = |byte| Uuid([byte; 16]);
        let part = Part { gpu: uuid(1), offset: 0, bytes: 8 };
        let pairs = [Pair { old: uuid(2), new: uuid(1) }, Pair { old: uuid(1), new: uuid(2) }];
        assert_eq!(place(&part, &pairs), uuid(2));
        assert_eq!(place(&part, &[]), uuid(1));
        assert_eq!(places(&[part], &pairs, uuid(2)), Some(&part));
        assert_eq!(places(&[part], &pairs, uuid(1)), None);
    }
}

//! The kernel's structures and request numbers for userfaultfd, as `include/uapi/linux/userfaultfd.h` lays them out.
//!
//! Every structure has its size asserted, because an ioctl's number contains the size: a wrong one is a wrong call.
//! The `userfaultfd` crate is not used, since it turns results into `usize` and loses the errno on which the pager's
//! correctness rests.

use std::mem::size_of;

/// Version of the interface, the only one there is.
pub(crate) const UFFD_API: u64 = 0xAA;
/// Register for faults on pages that do not exist.
pub(crate) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// `fork` is reported, with a userfaultfd for the child.
pub(crate) const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
/// `mremap` is reported.
pub(crate) const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// `madvise(MADV_DONTNEED)` and its like are reported.
pub(crate) const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// `munmap` is reported.
pub(crate) const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;

pub(crate) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const UFFD_EVENT_FORK: u8 = 0x13;
pub(crate) const UFFD_EVENT_REMAP: u8 = 0x14;
pub(crate) const UFFD_EVENT_REMOVE: u8 = 0x15;
pub(crate) const UFFD_EVENT_UNMAP: u8 = 0x16;

/// The fault was a write.
pub(crate) const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdioApi {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 24);

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdioRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}
const _: () = assert!(size_of::<UffdioRange>() == 16);

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdioRegister {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}
const _: () = assert!(size_of::<UffdioRegister>() == 32);

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdioCopy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    /// Written by the kernel: bytes copied, or a negative errno.
    pub(crate) copy: i64,
}
const _: () = assert!(size_of::<UffdioCopy>() == 40);

/// `struct uffdio_zeropage`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdioZeropage {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    /// Written by the kernel: bytes mapped, or a negative errno.
    pub(crate) zeropage: i64,
}
const _: () = assert!(size_of::<UffdioZeropage>() == 32);

/// `struct uffd_msg`, its union as three words: which of them mean something depends on the event.
///
/// ```text
///            word 0            word 1     word 2
/// pagefault  flags             address    thread id (if asked for)
/// fork       low 32 bits: fd
/// remap      from              to         length
/// remove     start             end
/// unmap      start             end
/// ```
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UffdMsg {
    pub(crate) event: u8,
    pub(crate) reserved1: u8,
    pub(crate) reserved2: u16,
    pub(crate) reserved3: u32,
    pub(crate) words: [u64; 3],
}
const _: () = assert!(size_of::<UffdMsg>() == 32);
const _: () = assert!(std::mem::offset_of!(UffdMsg, words) == 8);

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (UFFD_API << 8) | number
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

pub(crate) const UFFDIO_API: u64 = request(READ_WRITE, 0x3F, size_of::<UffdioApi>());
pub(crate) const UFFDIO_REGISTER: u64 = request(READ_WRITE, 0x00, size_of::<UffdioRegister>());
pub(crate) const UFFDIO_UNREGISTER: u64 = request(READ, 0x01, size_of::<UffdioRange>());
pub(crate) const UFFDIO_WAKE: u64 = request(READ, 0x02, size_of::<UffdioRange>());
pub(crate) const UFFDIO_COPY: u64 = request(READ_WRITE, 0x03, size_of::<UffdioCopy>());
pub(crate) const UFFDIO_ZEROPAGE: u64 = request(READ_WRITE, 0x04, size_of::<UffdioZeropage>());
// Values that a C program prints on x86-64 and 64-bit ARM.
const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01 && UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);

//! Simulated devices and their memory.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::page::Uuid;
use crate::{DEVICES_ENV, NODES_ENV};

/// What a device is called where its folder does not say otherwise.
pub const NAME: &str = "Simulated GPU";
/// Device memory comes in pieces of this size.
pub const GRANULE: usize = 2 << 20;

/// A device: a tmpfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its folder.
    pub folder: PathBuf,
    /// Its identity.
    pub uuid: Uuid,
    /// Its kind.
    pub name: String,
}

/// All devices of this machine, in the order of their folders' names. What has no identity is no device.
#[must_use]
pub fn all() -> Vec<Device> {
    let Some(folder) = std::env::var_os(DEVICES_ENV) else { return Vec::new() };
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    folders.into_iter().filter_map(|folder| device(&folder)).collect()
}

fn device(folder: &Path) -> Option<Device> {
    let digits = fs::read_to_string(folder.join("uuid")).ok()?;
    let name = fs::read_to_string(folder.join("name")).unwrap_or_else(|_| NAME.to_owned());
    Some(Device { folder: folder.to_owned(), uuid: parse(digits.trim())?, name: name.trim().to_owned() })
}

fn parse(digits: &str) -> Option<Uuid> {
    let number = u128::from_str_radix(digits, 16).ok()?;
    (digits.len() == 32).then(|| number.to_be_bytes())
}

impl Device {
    /// Bytes of memory, and bytes that are free.
    ///
    /// # Errors
    /// When its folder is gone.
    pub fn memory(&self) -> io::Result<(u64, u64)> {
        let path = CString::new(self.folder.as_os_str().as_bytes())?;
        // SAFETY: all-zero is a valid statvfs, which the call fills.
        let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are valid until the call returns.
        if unsafe { libc::statvfs(path.as_ptr(), &raw mut found) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((found.f_blocks * found.f_frsize, found.f_bfree * found.f_frsize))
    }

    /// Bytes of it that a process has mapped, in whatever mount namespace.
    #[must_use]
    pub fn used_by(&self, pid: u32) -> u64 {
        let Ok(own) = fs::metadata(&self.folder) else { return 0 };
        let number = format!("{:02x}:{:02x}", libc::major(own.dev()), libc::minor(own.dev()));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let bytes = |line: &str| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            if fields.nth(2)? != number {
                return None;
            }
            Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?)
        };
        maps.lines().filter_map(bytes).sum()
    }
}

/// Memory of a device: a file without a name, which is freed with its last user.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    bytes: usize,
}

impl Memory {
    /// Takes memory of a device.
    ///
    /// # Errors
    /// `ENOSPC` when the device is full.
    pub fn new(device: &Device, bytes: usize) -> io::Result<Self> {
        let path = CString::new(device.folder.as_os_str().as_bytes())?;
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
        // SAFETY: a valid path; the result is checked.
        let raw = unsafe { libc::open(path.as_ptr(), flags, 0o600) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        let length = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: plain call on a descriptor of ours.
        let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) };
        if result == 0 { Ok(Self { file, bytes }) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    /// The descriptor by which another process finds it, and its length.
    #[must_use]
    pub fn descriptor(&self) -> (i32, usize) {
        (self.file.as_raw_fd(), self.bytes)
    }

    /// Maps it: anywhere, or at `address`. The second value tells whether something else lay there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn map(&self, address: Option<usize>) -> io::Result<(usize, bool)> {
        let Some(address) = address else { return Ok((self.map_at(0, 0)?, false)) };
        match self.map_at(address, libc::MAP_FIXED_NOREPLACE) {
            Ok(at) => Ok((at, false)),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                Ok((self.map_at(address, libc::MAP_FIXED)?, true))
            }
            Err(error) => Err(error),
        }
    }

    fn map_at(&self, address: usize, flags: libc::c_int) -> io::Result<usize> {
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, self.file.as_raw_fd());
        let place = std::ptr::without_provenance_mut(address);
        // SAFETY: with MAP_FIXED this overwrites what is mapped there, as the driver that is simulated does.
        let got = unsafe { libc::mmap(place, self.bytes, protection, libc::MAP_SHARED | flags, fd, 0) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: our own mapping. A child must not have the device's ranges.
        unsafe { libc::madvise(got, self.bytes, libc::MADV_DONTFORK) };
        Ok(got.expose_provenance())
    }

    /// Fills it from memory of this process at `address`, reading as a driver pins: a page that is absent under a
    /// userfaultfd is an error and no fault.
    ///
    /// # Errors
    /// `EIO` for such a page.
    pub fn fill(&self, address: usize) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let memory = fs::File::open("/proc/self/mem")?;
        let file = fs::File::from(self.file.try_clone()?);
        let mut buffer = vec![0; GRANULE];
        let mut at = 0;
        while at < self.bytes {
            let count = GRANULE.min(self.bytes - at);
            memory.read_exact_at(&mut buffer[..count], (address + at) as u64)?;
            file.write_all_at(&buffer[..count], at as u64)?;
            at += count;
        }
        Ok(())
    }
}

/// Opens what a process with a context holds open.
///
/// # Errors
/// When one of the nodes is missing.
pub fn open_nodes() -> io::Result<Vec<fs::File>> {
    let list = std::env::var(NODES_ENV).unwrap_or_else(|_| "/dev/loop-control".to_owned());
    list.split(':').filter(|path| !path.is_empty()).map(fs::File::open).collect()
}

//! The memory of another process: reading and writing it, and what is mapped where.
//!
//! Writing needs ptrace rights over the target. A write reaches private memory that its owner may write; the kernel
//! answers `EFAULT` for read-only mappings, which have to be filled another way. In a range that is marked for huge
//! pages and not registered with a userfaultfd, the first write of a 2 MiB block makes a huge page.

use std::fs;
use std::io;

use nix::errno::Errno;

/// Pieces that one call may have (the kernel's `UIO_MAXIOV`).
pub const PIECES_MAX: usize = 1024;

/// Bytes for one place in another process.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Address in the target process.
    pub target: u64,
    /// What to write there.
    pub bytes: &'a [u8],
}

/// Writes pieces into process `pid`, in order, and returns the bytes written: fewer than given only if the kernel stopped between two pages.
///
/// # Errors
/// `ESRCH` when the process is gone, `EPERM` without rights, `EFAULT` when the first byte cannot be written.
///
/// # Panics
/// For more than [`PIECES_MAX`] pieces.
pub fn write(pid: i32, pieces: &[Piece<'_>]) -> Result<u64, Errno> {
    assert!(pieces.len() <= PIECES_MAX, "{} pieces, at most {PIECES_MAX}", pieces.len());
    let local: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.bytes.as_ptr().cast_mut().cast(),
            iov_len: piece.bytes.len(),
        })
        .collect();
    let remote: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(piece.target as usize),
            iov_len: piece.bytes.len(),
        })
        .collect();
    // SAFETY: the local vectors point to borrowed bytes that the call only reads; the remote ones name memory of
    // another process, which no reference of ours covers.
    let written = unsafe {
        libc::process_vm_writev(
            pid,
            local.as_ptr(),
            local.len() as libc::c_ulong,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    Errno::result(written).map(isize::unsigned_abs).map(|bytes| bytes as u64)
}

/// Reads memory of process `pid` at `address` and returns the bytes read: fewer than asked for if a page in between cannot be read.
///
/// # Errors
/// `ESRCH` when the process is gone, `EPERM` without rights, `EFAULT` when the first byte cannot be read.
pub fn read(pid: i32, address: u64, out: &mut [u8]) -> Result<u64, Errno> {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote =
        libc::iovec { iov_base: std::ptr::without_provenance_mut(address as usize), iov_len: out.len() };
    // SAFETY: the local vector is the borrowed buffer, the remote one names memory of another process.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    Errno::result(got).map(isize::unsigned_abs).map(|bytes| bytes as u64)
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// First byte after the mapping.
    pub end: u64,
    /// Whether its owner may read it.
    pub read: bool,
    /// Whether its owner may write it.
    pub write: bool,
    /// Whether its owner may execute it.
    pub execute: bool,
    /// Whether writes reach others (MAP_SHARED).
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Inode of the file, 0 for anonymous memory.
    pub inode: u64,
    /// Path of the file or the kernel's name such as `[heap]`; empty for plain anonymous memory.
    pub path: String,
}

/// What process `pid` has mapped, in order of address.
///
/// # Errors
/// When the process is gone or may not be looked at; `InvalidData` for a line that cannot be read.
pub fn maps(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    text.lines()
        .map(|line| {
            parse(line).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("line of /proc/{pid}/maps: {line}"))
            })
        })
        .collect()
}

fn parse(line: &str) -> Option<Mapping> {
    // The path may hold spaces and comes after padding.
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = fields.next()?;
    let _device = fields.next()?;
    let inode = fields.next()?;
    let path = fields.next().unwrap_or("").trim_start();
    if rights.len() != 4 {
        return None;
    }
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        read: rights[0] == b'r',
        write: rights[1] == b'w',
        execute: rights[2] == b'x',
        shared: rights[3] == b's',
        offset: u64::from_str_radix(offset, 16).ok()?,
        inode: inode.parse().ok()?,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let file =
            parse("7f00aa000000-7f00aa021000 r-xp 00001000 fd:01 123                        /opt/a b.so");
        let file = file.expect("a file");
        assert_eq!((file.start, file.end), (0x7f00_aa00_0000, 0x7f00_aa02_1000));
        assert_eq!((file.offset, file.inode, file.path.as_str()), (0x1000, 123, "/opt/a b.so"));
        assert!(file.read && !file.write && file.execute && !file.shared);
        let plain = parse("1000-2000 rw-s 00000000 00:00 0 ").expect("anonymous");
        assert!(plain.path.is_empty() && plain.shared && plain.write);
        assert_eq!(parse("1000 rw-s"), None);
    }

    #[test]
    fn own_memory_can_be_read_and_written() {
        let pid = i32::try_from(std::process::id()).expect("pids are int");
        let target = vec![7_u8; 10_000];
        let address = target.as_ptr().addr() as u64;
        let mut got = vec![0_u8; 10_000];
        assert_eq!(read(pid, address, &mut got), Ok(10_000));
        assert_eq!(got, target);
        let mut place = vec![0_u8; 4];
        let at = place.as_mut_ptr().addr() as u64;
        let pieces = [Piece { target: at, bytes: b"ab" }, Piece { target: at + 2, bytes: b"cd" }];
        assert_eq!(write(pid, &pieces), Ok(4));
        assert_eq!(std::hint::black_box(&place), b"abcd");
        assert!(maps(pid).expect("own maps").iter().any(|map| map.start <= at && at < map.end && map.write));
        assert_eq!(write(pid, &[Piece { target: 0, bytes: b"x" }]), Err(Errno::EFAULT));
    }
}

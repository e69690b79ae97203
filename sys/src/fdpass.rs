//! File descriptors through Unix sockets (`SCM_RIGHTS`).
//!
//! Answers for bytes in one direction, and for frames of them: a length (u32, little endian) and that many bytes. What is
//! in a frame is the caller's. Received descriptors are close-on-exec, so that they never leak into a child that was not
//! meant to have them.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The kernel's own limit for one message (`SCM_MAX_FD`).
pub const FDS_MAX: usize = 253;

/// Sends all of `bytes`; `fds` travel with the first byte.
///
/// # Errors
/// Those of `sendmsg(2)`; `InvalidInput` if `bytes` is empty, because descriptors need a byte to travel with.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.is_empty() || fds.len() > FDS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes cannot carry {} file descriptors", bytes.len(), fds.len()),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let iov = [IoSlice::new(&bytes[sent..])];
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if sent == 0 && !raw.is_empty() { &rights } else { &[] };
        match sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(count) => sent += count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Receives at most `buf.len()` bytes and the descriptors that came with them. 0 bytes mean that the peer is gone.
///
/// # Errors
/// Those of `recvmsg(2)`; `InvalidData` if the peer sent more than `fds_max` descriptors (all of them are closed).
pub fn recv(socket: &UnixStream, buf: &mut [u8], fds_max: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut fds = Vec::new();
    let (count, truncated) = loop {
        let mut iov = [IoSliceMut::new(buf)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel has just installed these descriptors for us, and nobody else knows them.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break (message.bytes, message.flags.contains(MsgFlags::MSG_CTRUNC));
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    if truncated || fds.len() > fds_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the peer sent {} file descriptors, at most {fds_max} were expected", fds.len()),
        ));
    }
    Ok((count, fds))
}

/// Sends a frame; `fds` travel with its first byte.
///
/// # Errors
/// Those of [`send`]; `InvalidInput` for a body of more than `max` bytes.
pub fn send_frame(socket: &UnixStream, body: &[u8], max: usize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if body.len() > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes is longer than {max}", body.len()),
        ));
    }
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(body);
    send(socket, &bytes, fds)
}

/// Receives a frame and the descriptors that came with it; `None` if the peer has closed the connection between frames.
///
/// # Errors
/// `InvalidData` for a frame of more than `max` bytes, `UnexpectedEof` for one that is cut off, and those of [`recv`].
pub fn recv_frame(
    socket: &UnixStream,
    max: usize,
    fds_max: usize,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut head = [0; 4];
    let mut have = 0;
    let mut fds = Vec::new();
    while have < head.len() {
        let (count, more) = recv(socket, &mut head[have..], fds_max)?;
        fds.extend(more);
        if count == 0 {
            return if have == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        have += count;
    }
    let length = u32::from_le_bytes(head) as usize;
    if length > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes is longer than {max}"),
        ));
    }
    // Grown as bytes arrive: a length that lies must not take memory.
    let mut body = Vec::new();
    Read::take(socket, length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((body, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_with_its_bytes_and_is_close_on_exec() {
        let (a, b) = UnixStream::pair().expect("pair");
        let mut file: File = tempfile();
        file.write_all(b"content").expect("write");
        file.rewind().expect("rewind");
        send(&a, b"hello", &[file.as_fd()]).expect("send");
        let mut buf = [0; 16];
        let (count, mut fds) = recv(&b, &mut buf, 1).expect("recv");
        assert_eq!(&buf[..count], b"hello");
        let fd = fds.pop().expect("one descriptor");
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).expect("flags");
        assert_ne!(flags & libc::FD_CLOEXEC, 0);
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).expect("read");
        assert_eq!(text, "content");
    }

    #[test]
    fn more_descriptors_than_expected_are_refused() {
        let (a, b) = UnixStream::pair().expect("pair");
        let file = tempfile();
        send(&a, b"x", &[file.as_fd(), file.as_fd()]).expect("send");
        let error = recv(&b, &mut [0; 4], 1).expect_err("two are too many");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_closed_peer_reads_as_zero_bytes() {
        let (a, b) = UnixStream::pair().expect("pair");
        drop(a);
        assert_eq!(recv(&b, &mut [0; 4], 1).expect("recv").0, 0);
    }

    fn tempfile() -> File {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        File::from(fd.expect("memfd"))
    }
}

//! A scripted CRIU at the lazy-pages socket.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use rewarm_criu::Error;
use rewarm_criu::lazy_pages::{Connection, Fault, Listener, Message};
use rewarm_sys::fdpass;

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let connection = Connection::new(ours);
    connection.set_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    (connection, theirs)
}

fn fault(connection: &mut Connection) -> Fault {
    match connection.message().expect_err("a broken script") {
        Error::LazyPages(fault) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn messages_are_read_one_by_one_with_their_descriptors() {
    let (mut connection, mut criu) = pair();
    let file = tempfile::tempfile().expect("a file");
    // All at once: reading one message must not take the next one's descriptor.
    for pid in [6_i32, 1] {
        criu.write_all(&pid.to_le_bytes()).expect("written");
        fdpass::send(&criu, &[0], &[file.as_fd()]).expect("sent");
    }
    criu.write_all(&(-7_i32).to_le_bytes()).expect("written");
    criu.write_all(&0x5253_5446_i32.to_le_bytes()).expect("written");
    for expected in [6, 1] {
        match connection.message().expect("a task") {
            Message::Task { pid, uffd } => {
                assert_eq!(pid, expected);
                let received = File::from(uffd).metadata().expect("metadata");
                assert_eq!(received.ino(), file.metadata().expect("metadata").ino());
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(connection.message().expect("a zombie"), Message::Zombie { pid: 7 }));
    assert!(matches!(connection.message().expect("the last word"), Message::Finished));
}

#[test]
fn broken_scripts_are_told_apart() {
    let (mut connection, criu) = pair();
    assert!(matches!(fault(&mut connection), Fault::Deadline { tasks: 0 }));
    drop(criu);
    assert!(matches!(fault(&mut connection), Fault::ClosedEarly { tasks: 0 }));

    let (mut connection, mut criu) = pair();
    criu.write_all(&[5, 0]).expect("written");
    drop(criu);
    assert!(matches!(fault(&mut connection), Fault::ClosedEarly { tasks: 0 }));

    let (mut connection, mut criu) = pair();
    criu.write_all(&5_i32.to_le_bytes()).expect("written");
    criu.write_all(&[0]).expect("written");
    assert!(matches!(fault(&mut connection), Fault::Descriptors { pid: 5, fds: 0 }));

    let (mut connection, mut criu) = pair();
    criu.write_all(&5_i32.to_le_bytes()).expect("written");
    drop(criu);
    assert!(matches!(fault(&mut connection), Fault::ClosedEarly { tasks: 1 }));

    let (mut connection, mut criu) = pair();
    criu.write_all(&0_i32.to_le_bytes()).expect("written");
    assert!(matches!(fault(&mut connection), Fault::Word { word: 0 }));

    let (mut connection, mut criu) = pair();
    criu.write_all(&5_i32.to_le_bytes()).expect("written");
    let file = tempfile::tempfile().expect("a file");
    let many: Vec<BorrowedFd<'_>> = vec![file.as_fd(); 3];
    fdpass::send(&criu, &[0], &many).expect("sent");
    assert!(matches!(fault(&mut connection), Fault::Stream { .. } | Fault::Descriptors { .. }));
}

#[test]
fn the_socket_lies_in_the_work_directory_however_long_its_path_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let work = folder.path().join("a".repeat(120)).join("b".repeat(120));
    fs::create_dir_all(&work).expect("a folder");
    let socket = work.join("lazy-pages.socket");
    drop(Listener::bind(&work).expect("bound"));
    assert!(!socket.exists(), "the name stays behind");
    fs::write(&socket, b"left behind").expect("a file");
    let listener = Listener::bind(&work).expect("bound in its place");
    // CRIU enters the directory and connects by the name alone.
    let script = "import socket, struct; s = socket.socket(socket.AF_UNIX); s.connect('lazy-pages.socket'); \
                  s.sendall(struct.pack('i', -3))";
    let mut peer = std::process::Command::new("python3");
    let peer = peer.args(["-c", script]).current_dir(&work).status();
    assert!(peer.expect("python runs").success());
    let mut connection = listener.accept().expect("connected");
    assert!(matches!(connection.message().expect("a zombie"), Message::Zombie { pid: 3 }));
    listener.set_nonblocking(true).expect("set");
    assert!(
        matches!(listener.accept(), Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::WouldBlock)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let (mut connection, mut criu) = pair();
        criu.write_all(&bytes).expect("written");
        drop(criu);
        let mut messages = 0;
        while let Ok(message) = connection.message() {
            messages += 1;
            if matches!(message, Message::Finished) {
                break;
            }
        }
        prop_assert!(messages <= bytes.len() / 4);
    }
}

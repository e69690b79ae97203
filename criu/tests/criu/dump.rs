//! A process tree goes through the page-server receiver and comes back with its memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::slice;
use std::thread;
use std::time::Duration;

use rewarm_criu::config::Config;
use rewarm_criu::image::pagemap::{self, Entry, Pagemap};
use rewarm_criu::image::{core, inventory, mm, pstree};
use rewarm_criu::layout::PAGE_BYTES;
use rewarm_criu::lazy_pages::{Listener, Message};
use rewarm_criu::page_server::{self, Fault, Flags, Object, PageSink};
use rewarm_criu::{Error, patch, stats};
use rewarm_sys::uffd::Uffd;

use crate::needs;
use crate::world::World;

/// A tree of two processes with threads, a pipe, private and shared memory in patterns, and checksums over all of it.
const TREE: &str = "
import mmap, os, threading, zlib
private = bytearray(b''.join(i.to_bytes(4, 'little') * 1024 for i in range(8192)))
shared = mmap.mmap(-1, 8 << 20)
shared.write(b''.join(i.to_bytes(4, 'little') * 1024 for i in range(2048)))
to_child, from_parent = os.pipe()
to_parent, from_child = os.pipe()
child = os.fork()
if child == 0:
    os.closerange(3, min(to_child, from_child))
    private[:4096] = b'c' * 4096
    while os.read(to_child, 1):
        os.write(from_child, zlib.crc32(private).to_bytes(4, 'little') + zlib.crc32(shared).to_bytes(4, 'little'))
    os._exit(0)
stop = threading.Event()
threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(3)]
for thread in threads: thread.start()
def sums():
    os.write(from_parent, b'x')
    return (zlib.crc32(private), zlib.crc32(shared), os.read(to_parent, 8).hex(), threading.active_count())
";

/// Keeps all pages in memory.
#[derive(Default)]
struct Store {
    objects: BTreeMap<Object, Vec<(Entry, Vec<u8>)>>,
    current: Option<Object>,
    vote: i32,
}

impl PageSink for Store {
    fn open(&mut self, object: Object) -> io::Result<()> {
        self.objects.insert(object, Vec::new());
        self.current = Some(object);
        Ok(())
    }

    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        let mut bytes = vec![0; (pages * PAGE_BYTES) as usize];
        data.read_exact(&mut bytes)?;
        let object = self.current.expect("an object is open");
        self.objects.get_mut(&object).expect("it is known").push((Entry { vaddr, pages, flags }, bytes));
        Ok(())
    }

    fn vote(&mut self) -> i32 {
        self.vote
    }
}

/// Writes pagemaps and pages files; those runs that `lazy` chooses get no bytes.
fn write_pages(world: &World, store: &Store, lazy: impl Fn(&Entry) -> bool) {
    let images = world.images();
    for (number, (object, runs)) in store.objects.iter().enumerate() {
        let pages_id = 0x10001 + number as u32;
        let mut entries = Vec::new();
        let mut pages = Vec::new();
        for (entry, bytes) in runs {
            if lazy(entry) {
                entries.push(Entry { flags: Flags::LAZY, ..*entry });
            } else {
                entries.push(*entry);
                pages.extend_from_slice(bytes);
            }
        }
        pagemap::write(&images, *object, &Pagemap { pages_id, entries }).expect("a pagemap");
        fs::write(pagemap::pages_path(&images, pages_id), pages).expect("pages");
    }
}

fn receive(world: &World, store: &mut Store) -> page_server::Summary {
    let (criu, stream) = world.dump_to_socket(&Config::dump());
    let summary = page_server::serve(&stream, store).expect("a whole dump");
    criu.succeeds();
    summary
}

#[test]
fn a_tree_comes_back_from_the_pages_that_were_received() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(TREE);
    let before = world.run("sums()");

    let mut store = Store::default();
    let summary = receive(&world, &mut store);
    world.gone();

    let images = world.images();
    let tasks = pstree::read(&images).expect("the tree");
    assert_eq!(tasks.len(), 2);
    assert_eq!((tasks[0].pid, tasks[0].threads.len()), (world.pid(), 4));
    assert_eq!(tasks[1].parent, tasks[0].pid);
    let thread = core::read(&images, tasks[0].threads[3]).expect("a thread");
    assert!(thread.task.is_none() && thread.credentials.is_some_and(|seen| seen.users == [0; 4]));
    assert_eq!(inventory::read(&images).expect("the inventory").image_version, 2);
    // 32 MiB in each of the two tasks, 8 MiB that they share, and two Pythons.
    assert_eq!(store.objects.len(), 3);
    assert_eq!(summary.objects, 3);
    assert!(summary.bytes > 72 << 20, "{summary:?}");
    let counted = stats::dump(&world.work()).expect("statistics");
    assert!(counted.frozen > Duration::ZERO && counted.pages_written * PAGE_BYTES > 64 << 20, "{counted:?}");

    write_pages(&world, &store, |_| false);
    world.restore();
    assert_eq!(world.run("sums()"), before);
}

#[test]
fn a_tree_comes_back_lazily_from_a_peer_that_fills_it() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(TREE);
    let before = world.run("sums()");
    let mut store = Store::default();
    receive(&world, &mut store);
    world.gone();

    let marked = patch::advise_huge_pages(&world.images(), world.pid(), slice::from_ref(&(0..u64::MAX)))
        .expect("advice");
    assert!(marked.iter().any(|vma| vma.bytes() >= 32 << 20), "{marked:?}");
    let is_lazy = |entry: &Entry| entry.flags.contains(Flags::LAZY);
    write_pages(&world, &store, is_lazy);
    let listener = Listener::bind(&world.work()).expect("a listener");
    let filled = thread::scope(|scope| {
        let filler = scope.spawn(|| fill(&world, &store, &listener));
        world.restore_with(|mut command| {
            command.arg("--lazy-pages");
            command
        });
        filler.join().expect("filled")
    });
    assert_eq!(filled, 2);
    assert_eq!(world.run("sums()"), before);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", world.pid())).expect("mappings");
    assert!(
        smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" hg")),
        "no advice restored"
    );
}

/// Fills all lazy pages of all tasks, answering faults with the same pages: after the last word everything is registered,
/// and before it a fault is served when it comes.
fn fill(world: &World, store: &Store, listener: &Listener) -> usize {
    let mut connection = listener.accept().expect("criu connects");
    connection.set_timeout(Some(Duration::from_millis(5))).expect("a timeout");
    let mut tasks: Vec<(u32, Uffd)> = Vec::new();
    loop {
        match connection.message() {
            Ok(Message::Task { pid, uffd }) => tasks.push((pid, Uffd::from(uffd))),
            Ok(Message::Zombie { pid }) => panic!("{pid} is no zombie"),
            Ok(Message::Finished) => break,
            Err(Error::LazyPages(rewarm_criu::lazy_pages::Fault::Deadline { .. })) => {
                tasks.iter().for_each(|(pid, uffd)| answer_faults(store, *pid, uffd));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    for (pid, uffd) in &tasks {
        answer_faults(store, *pid, uffd);
        let space = mm::read(&world.images(), *pid).expect("mappings");
        for (entry, bytes) in lazy_runs(store, *pid) {
            let end = entry.vaddr + bytes.len() as u64;
            for vma in
                space.vmas.iter().filter(|vma| vma.can_be_lazy() && vma.start < end && entry.vaddr < vma.end)
            {
                let (start, stop) = (entry.vaddr.max(vma.start), end.min(vma.end));
                let source = &bytes[(start - entry.vaddr) as usize..(stop - entry.vaddr) as usize];
                for (page, source) in source.chunks(PAGE_BYTES as usize).enumerate() {
                    // A page that was faulted in already is not replaced.
                    let _ = uffd.copy(start + page as u64 * PAGE_BYTES, source);
                }
            }
        }
    }
    tasks.len()
}

fn lazy_runs(store: &Store, pid: u32) -> impl Iterator<Item = &(Entry, Vec<u8>)> {
    let runs = &store.objects[&Object::Task { pid }];
    runs.iter().filter(|(entry, _)| entry.flags.contains(Flags::LAZY))
}

fn answer_faults(store: &Store, pid: u32, uffd: &Uffd) {
    let mut events = Vec::new();
    while uffd.read(&mut events).is_ok_and(|count| count > 0) {}
    for event in events {
        let rewarm_sys::uffd::Event::Fault { address, .. } = event else { continue };
        let page = address & !(PAGE_BYTES - 1);
        let holder = lazy_runs(store, pid)
            .find(|(entry, bytes)| (entry.vaddr..entry.vaddr + bytes.len() as u64).contains(&page));
        match holder {
            Some((entry, bytes)) => {
                let at = (page - entry.vaddr) as usize;
                let _ = uffd.copy(page, &bytes[at..at + PAGE_BYTES as usize]);
            }
            None => {
                let _ = uffd.zero(page, PAGE_BYTES);
            }
        }
    }
}

#[test]
fn a_vote_against_the_dump_lets_the_server_run_on() {
    let Some(criu) = needs::criu() else { return };
    let world = World::start(criu);
    world.run(TREE);
    let before = world.run("sums()");
    let (criu, stream) = world.dump_to_socket(&Config::dump());
    let mut store = Store { vote: 7, ..Store::default() };
    let summary = page_server::serve(&stream, &mut store).expect("a whole dump");
    assert_eq!(summary.vote, 7);
    let cause = criu.fails();
    assert!(cause.is_some(), "the log names no cause");
    assert_eq!(world.run("sums()"), before);
}

#[test]
fn a_receiver_that_gives_up_lets_the_server_run_on() {
    struct Full;
    impl PageSink for Full {
        fn open(&mut self, _: Object) -> io::Result<()> {
            Ok(())
        }
        fn run(&mut self, _: u64, _: u64, _: Flags, _: &mut dyn Read) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn vote(&mut self) -> i32 {
            0
        }
    }
    let Some(criu) = needs::criu() else { return };
    let world = World::start(criu);
    world.run(TREE);
    let before = world.run("sums()");
    let (criu, stream) = world.dump_to_socket(&Config::dump());
    let error = page_server::serve(&stream, &mut Full).expect_err("no room");
    assert!(matches!(error, Error::PageServer(Fault::Sink { .. })), "{error:?}");
    drop(stream);
    let cause = criu.fails().expect("a cause");
    assert!(cause.starts_with("page-xfer: "), "{cause}");
    assert_eq!(world.run("sums()"), before);
}

#[test]
fn pages_that_criu_wrote_itself_can_be_made_lazy() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run("data = bytes(range(256)) * 65536");
    world.dump();
    let images = world.images();
    let object = Object::Task { pid: world.pid() };
    let before = pagemap::read(&images, object).expect("a pagemap");
    let mut whole = Vec::new();
    pagemap::each_stored(&images, object, |vaddr, bytes| {
        whole.push((vaddr, bytes.to_vec()));
        Ok(())
    })
    .expect("stored pages");
    let mut taken = 0;
    let bytes = pagemap::make_lazy(&images, object, |vaddr, bytes| {
        assert!(
            whole.iter().any(|(at, stored)| *at == vaddr && stored == bytes),
            "other bytes at {vaddr:#x}"
        );
        taken += bytes.len() as u64;
        Ok(())
    })
    .expect("made lazy");
    assert!(bytes >= 16 << 20 && bytes == taken, "{bytes} {taken}");
    let after = pagemap::read(&images, object).expect("a pagemap");
    let both = Flags::LAZY | Flags::PRESENT;
    for (before, after) in before.entries.iter().zip(&after.entries) {
        let expected = if before.flags == both { Flags::LAZY } else { before.flags };
        assert_eq!((after.vaddr, after.pages, after.flags), (before.vaddr, before.pages, expected));
    }
    let left: u64 = after.entries.iter().map(Entry::stored_bytes).sum();
    let file = fs::metadata(pagemap::pages_path(&images, after.pages_id)).expect("pages");
    assert_eq!(file.len(), left);
}

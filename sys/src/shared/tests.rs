//! Owner, writer and reader of a stream together.

use super::*;
use crate::fresh::HUGE_BYTES;

const FOREVER: Duration = Duration::from_secs(20);

fn alive() -> bool {
    true
}

fn writer(owner: &Owner, regions: &[(u64, u64)]) -> Writer {
    let [content, table] = owner.files().map(|fd| fd.try_clone_to_owned().expect("duplicate"));
    let passing = *owner.passing();
    Writer::open(content, table, regions, passing).expect("a stream")
}

/// Bytes of memory that the content takes.
fn memory(owner: &Owner) -> i64 {
    nix::sys::stat::fstat(&owner.content).expect("our own file").st_blocks * 512
}

fn reader(owner: &Owner) -> Reader {
    let [content, table] = owner.for_reading().expect("descriptors");
    Reader::open(content, table).expect("a stream")
}

#[test]
fn a_block_is_readable_when_its_last_byte_has_arrived() {
    let owner = Owner::create(12_288, 4096, None).expect("memory files");
    let (writer, reader) = (writer(&owner, &[(0, 10_000)]), reader(&owner));
    writer.put(4096, &[2; 4096]).expect("room");
    writer.put(0, &[1; 4000]).expect("room");
    assert!(!reader.has(0) && reader.has(1) && !reader.has(2));
    writer.put(4000, &[3; 96]).expect("room");
    // The region ends here; what lies behind is never written.
    writer.put(8192, &[4; 1808]).expect("room");
    let first = reader.wait(0, Duration::ZERO, &alive).expect("arrived");
    assert_eq!((first[3999], first[4000], first.len()), (1, 3, 4096));
    assert_eq!(reader.wait(2, Duration::ZERO, &alive).expect("arrived")[..1808], [4; 1808]);
    assert_eq!(reader.arrived_bytes(), 10_000);
}

#[test]
fn a_reader_that_waits_is_woken() {
    let owner = Owner::create(8192, 4096, None).expect("memory files");
    let (writer, reader) = (writer(&owner, &[(0, 8192)]), reader(&owner));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| reader.wait(1, FOREVER, &alive).map(<[u8]>::to_vec));
        writer.put(2000, &[5; 6192]).expect("room");
        assert_eq!(waiting.join().expect("no panic"), Ok(vec![5; 4096]));
    });
}

#[test]
fn a_second_writer_does_again_what_the_first_left_half_done_and_nothing_else() {
    let owner = Owner::create(8192, 4096, None).expect("memory files");
    let reader = reader(&owner);
    let first = writer(&owner, &[(0, 8192)]);
    first.put(0, &[1; 6000]).expect("room");
    drop(first);
    let second = writer(&owner, &[(0, 8192)]);
    assert!(second.has_all(0, 4096) && !second.has_all(0, 4097));
    assert_eq!(reader.arrived_bytes(), 4096);
    // What is complete is not touched again, whoever sends it.
    second.put(0, &[9; 4096]).expect("room");
    second.put(4096, &[2; 4096]).expect("room");
    assert_eq!(reader.wait(0, Duration::ZERO, &alive).expect("arrived"), [1; 4096]);
    assert_eq!(reader.wait(1, Duration::ZERO, &alive).expect("arrived"), [2; 4096]);
}

#[test]
fn an_owner_that_gives_up_or_is_gone_wakes_who_waits_and_a_silent_one_is_late() {
    let owner = Owner::create(4096, 4096, None).expect("memory files");
    let reader = reader(&owner);
    assert_eq!(reader.wait(0, Duration::from_millis(5), &alive), Err(Missing::Late { block: 0 }));
    assert_eq!(reader.wait(0, FOREVER, &|| false), Err(Missing::Abandoned { block: 0 }));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| reader.wait(0, FOREVER, &alive).map(<[u8]>::to_vec));
        owner.fail();
        assert_eq!(waiting.join().expect("no panic"), Err(Missing::Failed { block: 0 }));
    });
}

#[test]
fn what_was_given_back_takes_no_memory_and_is_never_read_as_zeros() {
    let owner = Owner::create(16_384, 4096, None).expect("memory files");
    let (writer, reader) = (writer(&owner, &[(0, 16_384)]), reader(&owner));
    writer.put(0, &[1; 12_288]).expect("room");
    let too_early = owner.release(2..4).expect_err("block 3 is not there");
    assert_eq!(too_early.kind(), io::ErrorKind::InvalidInput);
    assert!(owner.release(3..5).is_err());
    let before = memory(&owner);
    owner.release(1..3).expect("both have arrived");
    assert_eq!(before - memory(&owner), 2 * 4096);
    assert_eq!(reader.wait(1, FOREVER, &alive), Err(Missing::Released { block: 1 }));
    assert!(reader.has(0) && !reader.has(1) && reader.has_arrived(1) && !reader.has_arrived(3));
    // A writer that goes on does not bring it again.
    drop(writer);
    let next = self::writer(&owner, &[(0, 16_384)]);
    assert!(next.has(2));
    assert_eq!(next.held_bytes(), 4096);
    assert_eq!(reader.arrived_bytes(), 12_288);
    next.put(4096, &[9; 8192]).expect("room");
    assert_eq!(reader.wait(2, FOREVER, &alive), Err(Missing::Released { block: 2 }));
    assert_eq!(reader.wait(0, FOREVER, &alive).expect("still here"), [1; 4096]);
}

/// Blocks of one page with their number in each byte.
fn numbered(block: u64) -> [u8; 4096] {
    [(block % 251) as u8 + 1; 4096]
}

#[test]
fn what_passes_takes_the_memory_of_what_was_given_back() {
    let owner = Owner::create(64 * 4096, 4096, None).expect("memory files");
    owner.pass();
    // The last block ends with 96 bytes of gap.
    let (writer, reader) = (writer(&owner, &[(0, 64 * 4096 - 96)]), reader(&owner));
    for block in 0..64 {
        let bytes = if block == 63 { 4000 } else { 4096 };
        writer.put(block * 4096, &numbered(block)[..bytes]).expect("room");
        let seen = reader.wait(block, Duration::ZERO, &alive).expect("arrived");
        assert_eq!(seen[..bytes], numbered(block)[..bytes]);
        assert!(seen[bytes..].iter().all(|&byte| byte == 0), "of another block");
        if let Some(done) = block.checked_sub(4) {
            owner.release(done..done + 1).expect("arrived");
            assert_eq!(reader.wait(done, FOREVER, &alive), Err(Missing::Released { block: done }));
        }
    }
    assert!(memory(&owner) <= 8 * 4096, "{} bytes", memory(&owner));
    // The rest is still what it was, and what nobody holds goes when nothing comes any more.
    owner.settle().expect("memory files");
    assert_eq!(memory(&owner), 4 * 4096);
    assert_eq!(reader.wait(61, FOREVER, &alive).expect("held"), numbered(61));
    owner.release(60..64).expect("arrived");
    assert_eq!(memory(&owner), 0);
}

#[test]
fn a_second_writer_of_what_passes_takes_nothing_that_is_held() {
    let owner = Owner::create(32 * 4096, 4096, None).expect("memory files");
    owner.pass();
    let (first, reader) = (writer(&owner, &[(0, 32 * 4096)]), reader(&owner));
    (0..8).for_each(|block| first.put(block * 4096, &numbered(block)).expect("room"));
    // Half done when its writer dies: its memory is taken again.
    first.put(20 * 4096, &[0xff; 100]).expect("room");
    owner.release(2..5).expect("arrived");
    drop(first);
    let second = writer(&owner, &[(0, 32 * 4096)]);
    owner.release(6..7).expect("arrived");
    (8..32).for_each(|block| second.put(block * 4096, &numbered(block)).expect("room"));
    for block in 0..32 {
        let seen = reader.wait(block, FOREVER, &alive);
        match block {
            2..=4 | 6 => assert_eq!(seen, Err(Missing::Released { block })),
            _ => assert_eq!(seen.expect("held"), numbered(block)),
        }
    }
    assert!(memory(&owner) <= 29 * 4096, "{} bytes", memory(&owner));
}

/// Whatever pages the content lies in, it is the same.
#[test]
fn what_stays_is_laid_into_huge_pages_and_not_changed() {
    let bytes = 3 * HUGE_BYTES as u64;
    let folder = huge_folder(4 * bytes, 0, 0);
    let Ok(folder) = folder else {
        assert!(!nix::unistd::geteuid().is_root(), "{folder:?}");
        return;
    };
    let owner = Owner::create(bytes, 512 << 10, Some(folder.as_fd())).expect("a folder in memory");
    let (writer, reader) = (writer(&owner, &[(0, bytes)]), reader(&owner));
    let content: Vec<u8> = (0..bytes).map(|at| (at / 8 % 251) as u8).collect();
    // The second huge page is begun at its end, so it is made of small ones.
    let half = HUGE_BYTES + HUGE_BYTES / 2;
    writer.put(half as u64, &content[half..2 * HUGE_BYTES]).expect("room");
    writer.put(0, &content[..half]).expect("room");
    writer.put(2 * HUGE_BYTES as u64, &content[2 * HUGE_BYTES..]).expect("room");
    let joined = writer.join_pages();
    assert!(joined <= bytes && joined.is_multiple_of(HUGE_BYTES as u64), "{joined}");
    for (block, expected) in (0..).zip(content.chunks(512 << 10)) {
        assert_eq!(reader.wait(block, Duration::ZERO, &alive).expect("arrived"), expected);
    }
}

/// Threads that write, read, compare and give back, in every order that they find.
#[test]
fn what_passes_between_threads_is_never_mixed_up() {
    const BLOCKS: u64 = 400;
    let owner = Owner::create(BLOCKS * 4096, 4096, None).expect("memory files");
    owner.pass();
    let (writer, reader) = (writer(&owner, &[(0, BLOCKS * 4096)]), reader(&owner));
    let (owner, writer, reader) = (&owner, &writer, &reader);
    std::thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || {
                for block in 0..BLOCKS {
                    // Each block in two parts by two threads.
                    let (at, part) = (block * 4096 + half * 2048, &numbered(block)[..2048]);
                    if half == 0 {
                        writer.put(at, part).expect("room");
                    } else {
                        let mut room = writer.room(at, 2048).expect("it is not there");
                        room.parts()[0].copy_from_slice(part);
                        room.done().expect("room");
                    }
                }
            });
        }
        for turn in 0..2 {
            scope.spawn(move || {
                for block in (turn..BLOCKS).step_by(2) {
                    let seen = reader.wait(block, FOREVER, &alive).expect("held by this thread");
                    assert_eq!(seen, numbered(block), "block {block}");
                    owner.release(block..block + 1).expect("arrived");
                }
            });
        }
    });
}

#[test]
fn what_is_filled_in_place_is_there_when_it_is_done() {
    let owner = Owner::create(3 * 4096, 4096, None).expect("memory files");
    let (writer, reader) = (writer(&owner, &[(0, 3 * 4096)]), reader(&owner));
    let content: Vec<u8> = (0..2 * 4096).map(|at| (at / 16) as u8).collect();
    let mut given_up = writer.room(2048, 8192).expect("nothing is there");
    given_up.parts().into_iter().for_each(|part| part.fill(0xff));
    drop(given_up);
    assert_eq!(owner.arrived_bytes(), 0);

    let mut room = writer.room(2048, 8192).expect("nothing is there");
    let lengths: Vec<usize> = room.parts().iter().map(|part| part.len()).collect();
    assert_eq!(lengths, [2048, 4096, 2048]);
    let mut at = 0;
    for part in room.parts() {
        part.copy_from_slice(&content[at..at + part.len()]);
        at += part.len();
    }
    assert!((0..3).all(|block| !writer.has(block)));
    room.done().expect("counted");
    assert_eq!(reader.wait(1, Duration::ZERO, &alive).expect("arrived"), &content[2048..6144]);
    assert!(!writer.has(0) && !writer.has(2), "half of each is missing");
    assert!(writer.room(0, 8192).is_none(), "a part of it is there");
    assert!(writer.room(4096 * 3 - 1, 2).is_none(), "it lies beyond the end");
    writer.put(0, &[1; 2048]).expect("room");
    let first = reader.wait(0, Duration::ZERO, &alive).expect("arrived");
    assert_eq!((&first[..2048], &first[2048..]), (&[1; 2048][..], &content[..2048]));
}

#[test]
fn a_reader_cannot_write() {
    let owner = Owner::create(4096, 4096, None).expect("memory files");
    let [content, table] = owner.for_reading().expect("descriptors");
    assert!(File::from(content).write_all_at(b"x", 0).is_err());
    assert!(Map::new(&table, HEAD_BYTES, true).is_err());
}

#[test]
fn nothing_can_be_put_beyond_the_end_and_foreign_files_are_refused() {
    let owner = Owner::create(4096, 4096, None).expect("memory files");
    let writer = writer(&owner, &[(0, 4096)]);
    assert_eq!(writer.put(1, &[0; 4096]).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
    let [content, table] = owner.files().map(|fd| fd.try_clone_to_owned().expect("duplicate"));
    assert!(Writer::open(content, table, &[(0, 4097)], false).is_err());
    let file = || OwnedFd::from(tempfile::tempfile().expect("a file"));
    assert!(Reader::open(file(), file()).is_err());
}

#[test]
fn an_empty_stream_can_be_opened() {
    let owner = Owner::create(0, 4096, None).expect("memory files");
    assert_eq!(reader(&owner).content_bytes(), 0);
}

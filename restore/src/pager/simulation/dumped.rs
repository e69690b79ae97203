//! Random process memory, dumped, stored, read again and filled, compared byte by byte.
//!
//! ```text
//! pages -> receiver, streamer -> session -> objects in memory -> boot object, chunks
//!                                                                     |         |
//!                    simulated kernel <- pager's threads <- plan <- layout   content
//! ```
//!
//! All of that is what serves real servers but for three things: CRIU (pages are given to the receiver as its page server would), the
//! fetcher's shared memory (chunks are read from the store one by one), and what the head of `simulation.rs` names.

use std::sync::Arc;

use rewarm_criu::image::mm::Vma;
use rewarm_criu::layout::Layout;
use rewarm_store::{Facts, Name, Reference, SessionOptions, Store, Target};

use super::machine::token;
use super::{Memory, Mistake, PAGE, Random, TASK, run_with, seeds};
use crate::lazy::TaskOrders;

const PAGE_BYTES: usize = PAGE as usize;
const WRITABLE: u32 = 3;
const PRIVATE_ANONYMOUS: u32 = 0x22;

/// An area of a task: its first page, and its pages, of which some were never touched.
type Area = (u64, Vec<Option<Vec<u8>>>);

/// A page of a server: noise as weights are, small numbers and addresses as in a heap, text, a page that is there twice, and zeros,
/// all of it or all but a byte.
fn page(random: &mut Random, before: &[Vec<u8>]) -> Vec<u8> {
    let words = |word: &mut dyn FnMut() -> u64| (0..PAGE / 8).flat_map(|_| word().to_le_bytes()).collect();
    match random.below(9) {
        0..3 => words(&mut || random.next()),
        3..5 => words(&mut || match random.below(3) {
            0 => 0,
            1 => random.below(64),
            _ => 0x7f00_0000_0000 | random.below(1 << 20) << 4,
        }),
        5 => b"text that compresses well, ".iter().copied().cycle().take(PAGE_BYTES).collect(),
        6 if !before.is_empty() => before[random.below(before.len() as u64) as usize].clone(),
        7 => {
            let mut page = vec![0; PAGE_BYTES];
            page[random.below(PAGE) as usize] = 1;
            page
        }
        _ => vec![0; PAGE_BYTES],
    }
}

fn memory(random: &mut Random) -> Vec<Area> {
    let (mut areas, mut before) = (Vec::new(), Vec::new());
    for index in 1..=2 + random.below(3) {
        let (pages, mut area) = (20 + random.below(80), Vec::new());
        while (area.len() as u64) < pages {
            // Runs of pages, some of them of one kind, with holes between them.
            let (run, hole) = (1 + random.below(30), random.below(3) * random.below(12));
            let same = (random.below(3) == 0).then(|| page(random, &before));
            for _ in 0..run {
                let page = same.clone().unwrap_or_else(|| page(random, &before));
                before.push(page.clone());
                area.push(Some(page));
            }
            area.extend((0..hole).map(|_| None));
        }
        areas.push((index << 20, area));
    }
    areas
}

/// Stores memory as a dump does, and reads from the store what a restore does.
fn dumped(runtime: &tokio::runtime::Runtime, areas: &[Area]) -> Memory {
    let mut runs = Vec::new();
    for (start, pages) in areas {
        for part in pages
            .iter()
            .zip(*start..)
            .collect::<Vec<_>>()
            .chunk_by(|(one, _), (other, _)| one.is_some() == other.is_some())
        {
            let bytes: Vec<u8> = part.iter().flat_map(|(page, _)| page.iter().flatten().copied()).collect();
            if !bytes.is_empty() {
                runs.push((part[0].1 * PAGE, bytes.into()));
            }
        }
    }
    let (meta, content) = runtime.block_on(async {
        let store = Store::nowhere("memory");
        let session = Arc::new(store.begin(SessionOptions::default()).await.expect("a session"));
        rewarm_snapshot::testing::dump(session.clone(), TASK, runs).await.expect("stored");
        let session = Arc::into_inner(session).expect("nobody else streams");
        let name: Name = "random".parse().expect("a name");
        session.publish(&name, "v1", Facts::default()).await.expect("published");
        let store_url = "/nowhere".parse().expect("a store");
        let reference = Reference { store: store_url, name, target: Target::Tag("v1".to_owned()) };
        let boot = store.resolve(&reference).await.expect("published").boot().await.expect("whole");
        let mut content = Vec::new();
        for chunk in 0..boot.chunks(0).await.expect("an index").len() {
            content.extend(boot.read_chunk(0, chunk).await.expect("a chunk"));
        }
        (boot.regions()[0].meta.to_vec(), content)
    });
    let layout = Layout::decode(&meta).expect("what the dump wrote");
    let vma = |(start, pages): &Area| Vma {
        start: start * PAGE,
        end: (start + pages.len() as u64) * PAGE,
        offset: 0,
        id: 0,
        protection: WRITABLE,
        flags: PRIVATE_ANONYMOUS,
        status: 0,
        madv: 0,
    };
    let vmas: Vec<Vma> = areas.iter().map(vma).collect();
    let plan = TaskOrders::of(&layout, TASK, 0, &vmas).plan().expect("what the dump wrote makes a plan");
    assert_eq!(content.len() as u64, layout.stream_bytes());
    let right = |page: &Option<Vec<u8>>| page.as_ref().map_or(0, |page| token(page));
    let areas = areas.iter().map(|(start, pages)| (*start, pages.iter().map(right).collect())).collect();
    Memory { areas, plan, content: Arc::new(content) }
}

fn run(runtime: &tokio::runtime::Runtime, seed: u64, mistake: Mistake) -> Result<(), String> {
    let mut random = Random::new(seed);
    let memory = dumped(runtime, &memory(&mut random));
    run_with(seed, mistake, &memory, random)
}

fn rounds() -> u64 {
    std::env::var("REWARM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(40)
}

#[test]
fn what_was_dumped_is_there_again_byte_by_byte() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for seed in seeds(rounds()) {
        if let Err(wrong) = run(&runtime, seed, Mistake::None) {
            panic!("seed {seed} (repeat with REWARM_SEED): {wrong}");
        }
    }
    let found = (1..=50).find(|&seed| run(&runtime, seed, Mistake::WrongChunk).is_err());
    assert!(found.is_some(), "a wrong byte was not found in 50 runs");
}

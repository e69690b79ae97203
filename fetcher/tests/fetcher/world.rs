//! A state folder, a store with snapshots of known content, and the fetcher's processes by their numbers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_fetcher::{Access, BLOCK_BYTES, Fetcher, Found, Settings, Stream};
use rewarm_store::{Facts, Name, Reference, RegionKind, SessionOptions, Store, StoreUrl};
use tempfile::TempDir;

/// How long a stream of these sizes may take on a busy machine.
pub(crate) const WITHIN: Duration = Duration::from_secs(60);

/// A small generator of numbers that a seed repeats.
#[derive(Debug, Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of the environment, or one of its own, which is printed.
    pub(crate) fn seeded(test: &str) -> Self {
        let given = std::env::var("REWARM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| {
            use std::hash::{BuildHasher, Hasher};
            std::hash::RandomState::new().build_hasher().finish()
        });
        println!("{test}: REWARM_TEST_SEED={seed}");
        Self(seed)
    }

    /// SplitMix64.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(crate) struct World {
    folder: TempDir,
    settings: Settings,
    runtime: tokio::runtime::Runtime,
}

impl World {
    pub(crate) fn new(limit_bytes: u64, idle: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for part in ["state", "store"] {
            std::fs::create_dir(folder.path().join(part)).expect("a folder");
        }
        let settings = Settings {
            state: folder.path().join("state"),
            program: std::env::current_exe().expect("this program"),
            limit_bytes: Some(limit_bytes),
            bound_bytes: None,
            disk: None,
            idle,
        };
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        Self { folder, settings, runtime }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.settings.state.clone()
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub(crate) fn url(&self) -> StoreUrl {
        self.store().display().to_string().parse().expect("a store")
    }

    pub(crate) fn access(&self) -> Access {
        Access::new(&self.url(), [])
    }

    pub(crate) fn fetcher(&self) -> Fetcher {
        Fetcher::new(self.settings.clone())
    }

    /// From here on streams take no more than this, also those that are held.
    pub(crate) fn bind(&mut self, bytes: u64) {
        self.settings.bound_bytes = Some(bytes);
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}@v1", self.url()).parse().expect("a reference")
    }

    /// Publishes a snapshot with regions of these lengths (in pages), made up of `seed`.
    pub(crate) fn publish(&self, name: &str, seed: u64, regions: &[u64]) {
        let published = async {
            let store = Store::open(&self.url()).await?;
            let session = store.begin(SessionOptions::default()).await?;
            for (index, pages) in regions.iter().enumerate() {
                let mut region = session.region(RegionKind::Task { pid: index as u32 }).await?;
                for part in content(seed, index, *pages).chunks(1 << 20) {
                    region.push(part.to_vec().into()).await?;
                }
                region.finish(Vec::new()).await?;
            }
            let name: Name = name.parse()?;
            session.publish(&name, "v1", Facts::default()).await
        };
        self.runtime.block_on(published).expect("published");
    }

    pub(crate) fn find(&self, name: &str) -> rewarm_fetcher::Result<Found> {
        let found = self.fetcher().find(&self.access(), &self.reference(name), None)?;
        Ok(found.into_iter().next().expect("a tag has a variant"))
    }

    pub(crate) fn open(&self, name: &str) -> rewarm_fetcher::Result<Stream> {
        self.fetcher().open(&self.access(), &self.find(name)?, Duration::from_secs(5))
    }

    /// Asserts that each byte of the stream is what was published. Takes the blocks as they come.
    pub(crate) fn assert_content(stream: &Stream, seed: u64, regions: &[u64]) {
        for (index, pages) in regions.iter().enumerate() {
            let (base, bytes) = stream.layout().regions()[index];
            let expected = content(seed, index, *pages);
            assert_eq!(bytes, expected.len() as u64);
            for (number, part) in expected.chunks(BLOCK_BYTES as usize).enumerate() {
                let block = base / BLOCK_BYTES + number as u64;
                let got = stream.wait(block, WITHIN).expect("it arrives");
                assert!(got[..part.len()] == *part, "block {block} of region {index} is wrong");
            }
        }
    }

    /// The keeper's process number, if it runs.
    pub(crate) fn keeper(&self) -> Option<i32> {
        let status = Fetcher::status(&self.settings.state).ok()??;
        i32::try_from(status.pid).ok()
    }

    /// The process numbers of the workers.
    pub(crate) fn workers(keeper: i32) -> Vec<i32> {
        let threads = std::fs::read_dir(format!("/proc/{keeper}/task")).into_iter().flatten().flatten();
        let children =
            threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        children
            .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
            .collect()
    }

    /// Waits until `done`.
    pub(crate) fn await_that(what: &str, done: impl Fn() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < WITHIN, "{what}: not within {WITHIN:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper() {
            let _ = kill(Pid::from_raw(keeper), Signal::SIGKILL);
        }
    }
}

/// What a region holds: pages that differ, some of them twice, some easy to compress.
pub(crate) fn content(seed: u64, region: usize, pages: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pages as usize * 4096);
    for page in 0..pages {
        // Every sixteenth page repeats one that came before: the same chunk at several places.
        let page = if page % 16 == 15 { page / 32 } else { page };
        let mut numbers = Numbers::new(seed ^ ((region as u64) << 48) ^ page);
        let random = page % 5 != 0;
        for word in 0..512_u64 {
            bytes.extend(if random { numbers.next() } else { seed ^ page ^ (word % 4) }.to_le_bytes());
        }
    }
    bytes
}

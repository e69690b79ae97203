//! The pager over the images of a real dump: content stream and plan from CRIU's own files.

use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rewarm_criu::image::{mm, pagemap, pstree};
use rewarm_criu::lazy_pages::Listener;
use rewarm_criu::page_server::Object;
use rewarm_criu::patch;
use rewarm_restore::pager::{
    self, AtFork, Config, Mapping, Mode, PAGE, Plan, Run, Source, SourceError, Summary, Task, Tasks,
    WorkingSet,
};
use rewarm_sys::guard::Guard;
use serde::{Deserialize, Serialize};

use crate::world::{PATIENCE, control};

const PROT_WRITE: u32 = 2;

/// How the pager of a real restore works.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Paging {
    pub(crate) images: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) mode: Mode,
    /// Time for each chunk.
    pub(crate) delay_us: u64,
}

/// The content streams of a tree, in memory.
struct Streams {
    streams: Vec<(u32, Vec<u8>)>,
    delay: Duration,
}

impl Streams {
    fn of(&self, task: u32) -> &[u8] {
        self.streams.iter().find(|(pid, _)| *pid == task).map_or(&[], |(_, bytes)| bytes)
    }
}

impl Source for Streams {
    fn chunk(&self, task: u32, offset: u64) -> Range<u64> {
        const CHUNK: u64 = 256 << 10;
        let start = offset / CHUNK * CHUNK;
        start..(start + CHUNK).min(self.of(task).len() as u64)
    }

    fn read(&self, task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        std::thread::sleep(self.delay);
        out(&self.of(task)[chunk.start as usize..chunk.end as usize]);
        Ok(())
    }

    fn is_near(&self, _task: u32, _offset: u64) -> bool {
        self.delay.is_zero()
    }
}

/// Makes the images lazy and fills what CRIU restores from them.
pub(crate) fn page(paging: &Paging) -> Result<Summary, pager::Error> {
    let control = control();
    let _guard = Guard::start(&[control.as_fd()]).expect("a guard");
    let (mut tasks, mut streams, mut pids) = (Vec::new(), Vec::new(), Vec::new());
    for task in pstree::read(&paging.images).expect("the tree") {
        let (plan, stream) = split(&paging.images, task.pid);
        if paging.mode == Mode::Eager {
            patch::advise_huge_pages(&paging.images, task.pid, &plan.huge()).expect("patched");
        }
        tasks.push(Task { pid: task.pid, plan: Arc::new(plan) });
        streams.push((task.pid, stream));
        pids.push(i32::try_from(task.pid).expect("pids are int"));
    }
    let config = Config {
        mode: paging.mode,
        threads: 2,
        record: false,
        working_set: WorkingSet::default(),
        devices: Vec::new(),
        shared: Vec::new(),
        tasks: Tasks::Numbers(pids),
        criu_within: PATIENCE,
        chunk_within: PATIENCE,
    };
    let source = Streams { streams, delay: Duration::from_micros(paging.delay_us) };
    let listener = Listener::bind(&paging.work).expect("the work directory is there");
    pager::run(config, tasks, Arc::new(source), listener, control)
}

/// Takes what may come later out of the images: the plan and the content stream, without zero pages.
fn split(images: &Path, pid: u32) -> (Plan, Vec<u8>) {
    let (mut runs, mut stream): (Vec<Run>, Vec<u8>) = (Vec::new(), Vec::new());
    let taken = pagemap::make_lazy(images, Object::Task { pid }, |vaddr, bytes| {
        for (index, page) in bytes.chunks(PAGE as usize).enumerate() {
            if page.iter().all(|byte| *byte == 0) {
                continue;
            }
            let vaddr = vaddr + index as u64 * PAGE;
            match runs.last_mut() {
                Some(last) if last.vaddr + last.bytes == vaddr => last.bytes += PAGE,
                _ => runs.push(Run { vaddr, bytes: PAGE, offset: stream.len() as u64 }),
            }
            stream.extend_from_slice(page);
        }
        Ok(())
    });
    taken.expect("the images can be split");
    let vmas = mm::read(images, pid).expect("an mm image").vmas;
    let mappings = vmas.iter().filter(|vma| vma.can_be_lazy()).map(|vma| Mapping {
        start: vma.start,
        end: vma.end,
        writable: vma.protection & PROT_WRITE != 0,
        at_fork: AtFork::Copied,
    });
    let plan = Plan::new(mappings.collect(), &runs, stream.len() as u64).expect("images make a plan");
    (plan, stream)
}

//! The memory that takes a server's pages and files while it is frozen.
//!
//! Page allocation is what limits a receiver (on the development machine 1.0 GiB/s into fresh memory against 4 GiB/s into
//! memory that was touched before; memory that the host of a virtual machine has taken back 0.2 GiB/s), so the expected amount
//! is touched, in huge pages while those come quickly, before the freeze: the last of it while runc and CRIU start.
//! An arena has a limit. Where a server has more, whoever fills waits until a segment comes back, which it does when
//! the last user of its bytes drops them: that is how a store that is slower than CRIU makes CRIU wait. Where the system has
//! less memory than that, the limit comes down to what there is.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use memmap2::{Advice, MmapMut};
use rewarm_sys::fresh::{Fresh, HUGE_BYTES, populate};

/// Bytes of a segment: one huge page. Larger ones would be held longer by the last chunk that lies in them.
pub(crate) const SEGMENT_BYTES: usize = HUGE_BYTES;

/// No more than this may be missing when the freeze begins: memory that was quick so far need not stay so, and what is missing
/// then is made while the server is frozen (seen: 0.5 s of it).
const MISSING_BYTES_MAX: usize = 16 << 20;

/// The least that an arena may have: a chunk that is not ended and a batch that is not full hold parts of five segments at
/// most, one is being filled, and the others keep CRIU and the writer apart.
pub const ARENA_BYTES_MIN: u64 = 16 << 20;

/// The same in segments.
const SEGMENTS_MIN: usize = ARENA_BYTES_MIN as usize / SEGMENT_BYTES;

/// What an arena that was refused memory leaves to the others: stacks of threads, buffers of codecs, requests to the store.
const LEFT_TO_OTHERS: usize = (32 << 20) / SEGMENT_BYTES;

/// Memory in segments, up to a limit. Clones are the same arena.
#[derive(Clone)]
pub(crate) struct Arena(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// A segment came back, or the arena was closed.
    changed: Condvar,
    fresh: Fresh,
    #[cfg(test)]
    refuse_from: usize,
}

struct State {
    /// The limit of segments.
    max: usize,
    free: Vec<MmapMut>,
    /// Segments that exist, free or in use.
    made: usize,
    /// Nobody fills any more: what comes back goes to the system.
    closed: bool,
}

impl State {
    fn of(bytes_max: u64) -> Self {
        let max = usize::try_from(bytes_max.max(ARENA_BYTES_MIN)).unwrap_or(usize::MAX) / SEGMENT_BYTES;
        Self { max, free: Vec::new(), made: 0, closed: false }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a segment that somebody is about to make, unless there are `limit` already.
    fn claim(&self, limit: usize) -> bool {
        let mut state = self.lock();
        let may = !state.closed && state.made < limit.min(state.max);
        state.made += usize::from(may);
        may
    }

    /// A segment that was claimed could not be made: from here on the arena makes do with less than it has now. Whether it
    /// can; if not, the caller's error stands.
    fn make_do(&self) -> bool {
        let mut state = self.lock();
        state.made -= 1;
        let max = state.made.saturating_sub(LEFT_TO_OTHERS);
        if max < SEGMENTS_MIN {
            return false;
        }
        state.max = state.max.min(max);
        let beyond = state.made.saturating_sub(state.max);
        let kept = state.free.len().saturating_sub(beyond);
        let given_back = state.free.split_off(kept);
        state.made -= given_back.len();
        true
    }

    /// A segment with its pages.
    fn map(&self) -> io::Result<MmapMut> {
        #[cfg(test)]
        if self.lock().made > self.refuse_from {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut map = MmapMut::map_anon(SEGMENT_BYTES)?;
        let touch = |map: &mut MmapMut| match populate(map) {
            Ok(()) => Ok(()),
            // Linux before 5.14. One byte a page is enough.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                map.iter_mut().step_by(4096).for_each(|byte| *byte = 0);
                Ok(())
            }
            Err(error) => Err(error),
        };
        let huge = self.fresh.next_is_huge();
        // Refused where the kernel has no transparent huge pages; the arena is only slower then.
        let _ = map.advise(if huge { Advice::HugePage } else { Advice::NoHugePage });
        if huge {
            self.fresh.bring_huge(|| touch(&mut map))?
        } else {
            touch(&mut map)?
        }
        Ok(map)
    }
}

impl Arena {
    /// An arena of at most `bytes_max` bytes, and at least [`ARENA_BYTES_MIN`].
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State::of(bytes_max)),
            changed: Condvar::new(),
            fresh: Fresh::default(),
            #[cfg(test)]
            refuse_from: usize::MAX,
        }))
    }

    /// Makes and touches segments until there are `bytes` of them. Blocks; meant for a thread of its own beside the one
    /// that fills, which takes them as they come. Calls `nearly` once, when what is left will take no longer than
    /// `margin`, judged by what was touched so far.
    ///
    /// One thread does it: two were not faster on the development machine.
    pub(crate) fn touch(&self, bytes: u64, margin: Duration, nearly: impl FnOnce()) -> io::Result<()> {
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(SEGMENT_BYTES);
        let wanted = wanted.min(self.0.lock().max);
        let (began, mut nearly) = (Instant::now(), Some(nearly));
        for done in 1.. {
            if !self.0.claim(wanted) {
                break;
            }
            match self.0.map() {
                Ok(map) => self.0.lock().free.push(map),
                Err(_) if self.0.make_do() => break,
                Err(error) => return Err(error),
            }
            self.0.changed.notify_one();
            let left = u32::try_from(wanted.saturating_sub(done)).unwrap_or(u32::MAX);
            if left as usize * SEGMENT_BYTES > MISSING_BYTES_MAX {
                continue;
            }
            if began.elapsed() / u32::try_from(done).unwrap_or(u32::MAX) * left <= margin {
                nearly.take().into_iter().for_each(|nearly| nearly());
            }
        }
        nearly.take().into_iter().for_each(|nearly| nearly());
        Ok(())
    }

    /// A segment to fill. Waits for one to come back while the arena has as many as it may.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `Interrupted` when the arena is closed.
    pub(crate) fn segment(&self, deadline: Instant) -> io::Result<Segment> {
        let segment = |map| Segment { map: Some(map), home: self.0.clone() };
        let mut state = self.0.lock();
        loop {
            if state.closed {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the dump was given up"));
            }
            if let Some(map) = state.free.pop() {
                return Ok(segment(map));
            }
            if state.made < state.max {
                state.made += 1;
                drop(state);
                match self.0.map() {
                    Err(_) if self.0.make_do() => {}
                    made => return made.map(segment),
                }
                state = self.0.lock();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let bytes = state.max * SEGMENT_BYTES;
                let text = format!("the store did not take the first {} MiB in time", bytes >> 20);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends filling: whoever waits for a segment fails, and memory goes back to the system as its last user drops it.
    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        let free = std::mem::take(&mut state.free);
        drop(state);
        drop(free);
        self.0.changed.notify_all();
    }
}

/// Memory that is being filled. Dropped, or shared and dropped by everybody, it goes back to its arena.
pub(crate) struct Segment {
    map: Option<MmapMut>,
    home: Arc<Shared>,
}

impl Segment {
    /// Ends filling: the first `bytes` bytes can be shared from here on.
    pub(crate) fn share(self, bytes: usize) -> Bytes {
        Bytes::from_owner(self).slice(..bytes)
    }

    fn map(&self) -> &MmapMut {
        self.map.as_ref().expect("there until it is dropped")
    }
}

impl Deref for Segment {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map()
    }
}

impl DerefMut for Segment {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_mut().expect("there until it is dropped")
    }
}

impl AsRef<[u8]> for Segment {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let map = self.map.take();
        let mut state = self.home.lock();
        if state.closed {
            return;
        }
        if state.made > state.max {
            state.made -= 1;
        } else {
            state.free.extend(map);
        }
        drop(state);
        self.home.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(30)
    }

    #[test]
    fn what_is_filled_can_be_shared_and_comes_back_when_all_have_dropped_it() {
        let arena = Arena::new(0);
        let mut held: Vec<Segment> = (0..ARENA_BYTES_MIN as usize / SEGMENT_BYTES)
            .map(|_| arena.segment(soon()).expect("room"))
            .collect();
        assert_eq!(arena.segment(soon()).err().expect("full").kind(), io::ErrorKind::TimedOut);
        let mut segment = held.pop().expect("some");
        segment[..3].copy_from_slice(b"abc");
        let bytes = segment.share(3);
        let part = bytes.slice(1..);
        drop(bytes);
        assert_eq!(part, "bc");
        assert!(arena.segment(soon()).is_err(), "a part still holds it");
        drop(part);
        arena.segment(soon()).expect("it came back");
    }

    #[test]
    fn a_segment_that_comes_back_lets_a_waiting_thread_go() {
        let arena = Arena::new(0);
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut held: Vec<Segment> = (0..ARENA_BYTES_MIN as usize / SEGMENT_BYTES)
            .map(|_| arena.segment(soon()).expect("room"))
            .collect();
        let other = arena.clone();
        let waiting = std::thread::spawn(move || other.segment(deadline).map(drop));
        std::thread::sleep(Duration::from_millis(20));
        held.pop();
        waiting.join().expect("no panic").expect("a segment");
    }

    #[test]
    fn closing_lets_a_waiting_thread_fail() {
        let arena = Arena::new(0);
        let deadline = Instant::now() + Duration::from_secs(20);
        let _held: Vec<Segment> = (0..ARENA_BYTES_MIN as usize / SEGMENT_BYTES)
            .map(|_| arena.segment(soon()).expect("room"))
            .collect();
        let other = arena.clone();
        let waiting = std::thread::spawn(move || other.segment(deadline).map(drop));
        arena.close();
        let error = waiting.join().expect("no panic").expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }

    /// An arena whose memory ends at so many segments.
    fn short_from(refuse_from: usize) -> Arena {
        let Shared { state, changed, fresh, .. } =
            Arc::into_inner(Arena::new(1 << 30).0).expect("no clone yet");
        Arena(Arc::new(Shared { state, changed, fresh, refuse_from }))
    }

    #[test]
    fn what_memory_there_is_is_made_do_with_and_some_of_it_left_to_others() {
        let arena = short_from(SEGMENTS_MIN + LEFT_TO_OTHERS + 3);
        arena.touch(1 << 30, Duration::ZERO, || ()).expect("enough");
        let free = arena.0.lock().free.len();
        let made = arena.0.lock().made;
        assert_eq!((free, made), (SEGMENTS_MIN + 3, SEGMENTS_MIN + 3));
        let mut held: Vec<_> = (0..SEGMENTS_MIN + 3).map(|_| arena.segment(soon()).expect("room")).collect();
        assert_eq!(arena.segment(soon()).err().expect("full").kind(), io::ErrorKind::TimedOut);
        held.pop();
        arena.segment(soon()).expect("it came back");
    }

    #[test]
    fn memory_that_ends_while_all_is_in_use_is_waited_for() {
        let arena = short_from(SEGMENTS_MIN + LEFT_TO_OTHERS);
        let all = SEGMENTS_MIN + LEFT_TO_OTHERS;
        let mut held: Vec<_> = (0..all).map(|_| arena.segment(soon()).expect("room")).collect();
        assert_eq!(arena.segment(soon()).err().expect("short").kind(), io::ErrorKind::TimedOut);
        held.truncate(SEGMENTS_MIN);
        assert_eq!(arena.0.lock().made, SEGMENTS_MIN, "what is beyond the limit goes back to the system");
        assert!(arena.segment(soon()).is_err(), "the limit stays");
        held.pop();
        arena.segment(soon()).expect("it came back");
    }

    #[test]
    fn less_than_the_least_is_an_error() {
        let arena = short_from(SEGMENTS_MIN + LEFT_TO_OTHERS - 1);
        assert!(arena.touch(1 << 30, Duration::ZERO, || ()).is_err());
        let _held: Vec<_> = (0..SEGMENTS_MIN + LEFT_TO_OTHERS - 1).map(|_| arena.segment(soon())).collect();
        assert_eq!(arena.segment(soon()).err().expect("short").kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn no_more_is_touched_than_the_limit() {
        let arena = Arena::new(ARENA_BYTES_MIN);
        let mut told = 0;
        arena.touch(u64::MAX, Duration::ZERO, || told += 1).expect("memory");
        assert_eq!(told, 1);
        assert_eq!(arena.0.lock().free.len() * SEGMENT_BYTES, ARENA_BYTES_MIN as usize);
    }
}

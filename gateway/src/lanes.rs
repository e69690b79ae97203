//! Threads that carry connections. Each has a runtime of its own, and a connection stays where it was put: whatever wakes
//! whatever while a request is carried, client, replica, body, is on the same thread. In a runtime that all threads share
//! a request wakes another thread several times, and on two cores that took more time than the proxy itself.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Sooner than deadlines are, as a rule, and rare enough to cost nothing.
const TICK: Duration = Duration::from_secs(1);

thread_local! {
    /// Which lane this thread is; what is on none is as if on the first.
    static HERE: Cell<usize> = const { Cell::new(0) };
}

/// The lane that this thread is.
pub(crate) fn here() -> usize {
    HERE.get()
}

/// Threads for connections, as many as it was started with. They end when this is dropped, and what they carry with them.
pub struct Lanes {
    lanes: Vec<Lane>,
}

struct Lane {
    runtime: Handle,
    /// Connections that it carries.
    carries: Arc<AtomicUsize>,
    /// Dropped, it ends the thread.
    _stop: oneshot::Sender<()>,
}

/// One connection on a lane.
pub(crate) struct Carried(Arc<AtomicUsize>);

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lanes {
    /// Starts so many threads, at least one.
    ///
    /// # Errors
    /// The system gives no thread, or no descriptors for its runtime.
    pub fn start(count: usize) -> io::Result<Arc<Self>> {
        let lanes = (0..count.max(1)).map(Lane::start).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { lanes }))
    }

    /// Carries a connection on the lane that carries fewest. It keeps what it is given to its end: a future that waited for
    /// it would be as large again, and there are thousands.
    pub(crate) fn carry<F>(&self, connection: impl FnOnce(Carried) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let lane = self
            .lanes
            .iter()
            .min_by_key(|lane| lane.carries.load(Ordering::Relaxed))
            .expect("there is at least one");
        lane.carries.fetch_add(1, Ordering::Relaxed);
        lane.runtime.spawn(connection(Carried(lane.carries.clone())));
    }
}

impl Lane {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
            HERE.set(number);
            runtime.block_on(until(stopped));
        })?;
        Ok(Self { runtime: handle, carries: Arc::default(), _stop: stop })
    }
}

/// Waits for the sender's end: nothing is ever sent.
///
/// Beside it a clock ticks. Each head of a request has its deadline, and a runtime in which no other moment is nearer
/// wakes itself through a descriptor for each of them: a system call and a round of its loop for most requests.
async fn until(mut stopped: oneshot::Receiver<()>) {
    while tokio::time::timeout(TICK, &mut stopped).await.is_err() {}
}

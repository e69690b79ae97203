//! One replica, as the parent deals with it: one thing after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::link::{Line, ToGateway};
use crate::replicas::{Order, Replicas};

/// How long a server may take to end by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Something to do with a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    Pause,
    Wake,
    Stop,
    /// As [`Job::Stop`]; a start that is under way is given up.
    GiveUp,
}

/// The task of one replica.
pub(super) struct Task {
    jobs: mpsc::UnboundedSender<Job>,
    give_up: Option<oneshot::Sender<()>>,
    work: JoinHandle<()>,
}

/// What the task works with.
struct Worker {
    name: String,
    replicas: Arc<dyn Replicas>,
    line: Line,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// Its end is expected from now on.
    ending: Arc<AtomicBool>,
}

impl Task {
    /// Makes a replica.
    pub(super) fn start(order: Order, replicas: Arc<dyn Replicas>, line: Line) -> Self {
        let (give_up, given_up) = oneshot::channel();
        let (jobs, worker) = Worker::new(&order.name, replicas, line);
        let work = tokio::spawn(async move {
            match worker.replicas.start(order, given_up).await {
                Ok(started) => {
                    worker.tell(&ToGateway::Started { name: worker.name.clone(), started });
                    worker.work(true).await;
                }
                Err(reason) => {
                    worker.tell(&ToGateway::Failed { name: worker.name.clone(), reason });
                    worker.work(false).await;
                }
            }
        });
        Self { jobs, give_up: Some(give_up), work }
    }

    /// Makes a snapshot of a replica that nobody uses, and tells what the pool's snapshot is from then on.
    pub(super) fn capture(order: Order, replicas: Arc<dyn Replicas>, line: Line) -> Self {
        let (give_up, given_up) = oneshot::channel();
        let (jobs, worker) = Worker::new(&order.name, replicas, line);
        let work = tokio::spawn(async move {
            let pool = order.pool.clone();
            let problem = worker.replicas.capture(order, given_up).await.err();
            if problem.is_none()
                && let Ok(known) = worker.replicas.find(&pool).await
            {
                worker.tell(&ToGateway::Known { pool: pool.name, known });
            }
            worker.tell(&ToGateway::Captured { name: worker.name.clone(), problem });
        });
        Self { jobs, give_up: Some(give_up), work }
    }

    /// Takes over a replica that is there.
    pub(super) fn adopt(name: &str, replicas: Arc<dyn Replicas>, line: Line) -> Self {
        let (jobs, worker) = Worker::new(name, replicas, line);
        Self { jobs, give_up: None, work: tokio::spawn(worker.work(true)) }
    }

    pub(super) fn give(&mut self, job: Job) {
        if job == Job::GiveUp
            && let Some(give_up) = self.give_up.take()
        {
            // The start may be over already.
            let _ = give_up.send(());
        }
        // It has done its last job where nobody listens.
        let _ = self.jobs.send(job);
    }

    pub(super) fn is_over(&self) -> bool {
        self.work.is_finished()
    }

    /// Nothing more will be asked for. A start that is under way is given up, what was asked for is done.
    pub(super) async fn abandon(self) {
        let Self { jobs, give_up, work } = self;
        drop((jobs, give_up));
        // A task does not panic.
        let _ = work.await;
    }
}

impl Worker {
    fn new(name: &str, replicas: Arc<dyn Replicas>, line: Line) -> (mpsc::UnboundedSender<Job>, Self) {
        let (give, jobs) = mpsc::unbounded_channel();
        (give, Self { name: name.to_owned(), replicas, line, jobs, ending: Arc::default() })
    }

    fn tell(&self, message: &ToGateway) {
        if let Err(error) = self.line.tell(message, &[]) {
            tracing::debug!(%error, "the gateway cannot be told");
        }
    }

    /// Does what is asked for until the replica is gone. `there`: whether there is anything.
    async fn work(mut self, there: bool) {
        let watching = there.then(|| self.watch());
        while let Some(job) = self.jobs.recv().await {
            let name = self.name.clone();
            let done = match job {
                Job::Pause => {
                    self.replicas.pause(&name).await.map(|()| ToGateway::Paused { name: name.clone() })
                }
                Job::Wake => {
                    self.replicas.wake(&name).await.map(|()| ToGateway::Woken { name: name.clone() })
                }
                Job::Stop | Job::GiveUp => {
                    self.ending.store(true, Ordering::Release);
                    if there && let Err(reason) = self.replicas.stop(&name, STOP_TIMEOUT).await {
                        tracing::warn!(replica = name, reason, "a replica could not be stopped");
                    }
                    self.tell(&ToGateway::Stopped { name });
                    break;
                }
            };
            self.tell(&done.unwrap_or_else(|reason| ToGateway::Failed { name, reason }));
        }
        if let Some(watching) = watching {
            watching.abort();
        }
    }

    /// Tells when the replica ends by itself.
    fn watch(&self) -> JoinHandle<()> {
        let (name, replicas, line, ending) =
            (self.name.clone(), self.replicas.clone(), self.line.clone(), self.ending.clone());
        tokio::spawn(async move {
            let reason = replicas.ended(&name).await;
            if !ending.load(Ordering::Acquire) {
                // The gateway may be gone.
                let _ = line.tell(&ToGateway::Ended { name, reason }, &[]);
            }
        })
    }
}

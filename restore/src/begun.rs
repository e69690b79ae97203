//! Every replica that one operation has begun, so that all of them can be given up together when it is interrupted.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rewarm_container::shim::Client;
use rewarm_container::{Name, State};
use rewarm_report::{Clock, Stage};

use crate::error::{Cause, Error, Result};

/// How long the folder of a replica that was killed may take to go.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(20);

/// Where replicas are made: what a cold start needs, and a restore among other things.
#[derive(Clone)]
pub struct Ground {
    /// The replicas of this machine.
    pub state: State,
    /// The program whose hidden verb `shim` owns a replica.
    pub program: PathBuf,
    /// Measures the stages.
    pub clock: Clock,
}

/// Replicas that were begun, in the order of their shims. Clones share one list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Begun {
    shared: Arc<(Mutex<List>, Condvar)>,
}

#[derive(Debug, Default)]
struct List {
    clients: Vec<Arc<Client>>,
    /// Replicas that are being laid out: their shims cannot be asked to stop before that is done.
    laying_out: usize,
    /// Nothing more may be begun.
    over: bool,
}

/// A replica that is being laid out, until it is dropped.
pub(crate) struct LayingOut<'a>(&'a Begun);

impl Drop for LayingOut<'_> {
    fn drop(&mut self) {
        self.0.lock().laying_out -= 1;
        self.0.shared.1.notify_all();
    }
}

impl Begun {
    /// Takes the name and starts the shim of a new replica. The second value is to be kept until it is laid out.
    pub(crate) fn begin(
        &self,
        state: &State,
        program: &Path,
        name: &Name,
    ) -> std::result::Result<(Arc<Client>, LayingOut<'_>), Cause> {
        let laying_out = {
            let mut list = self.lock();
            if list.over {
                return Err(Cause::GivenUp);
            }
            list.laying_out += 1;
            LayingOut(self)
        };
        let client = Arc::new(Client::spawn(state.create(name)?, program)?);
        self.lock().clients.push(client.clone());
        Ok((client, laying_out))
    }

    /// Ends all of them, those that serve already too, and waits until nothing is left. Gives the names of those that were
    /// there. Nothing can be begun afterwards.
    fn give_up(&self, state: &State, reason: &str) -> Vec<Name> {
        let clients = {
            let mut list = self.lock();
            list.over = true;
            while list.laying_out > 0 {
                list = self.shared.1.wait(list).unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::take(&mut list.clients)
        };
        let mut names = Vec::new();
        for client in clients {
            // One that failed before has been given up already.
            if client.kill(reason).is_ok() {
                remove(state, client.name());
                names.push(client.name().clone());
            }
        }
        names
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Frees the name of a replica that has ended: one that served has left its logs and its status.
fn remove(state: &State, name: &Name) {
    let deadline = Instant::now() + REMOVAL_TIMEOUT;
    while Instant::now() < deadline {
        match state.remove(name) {
            Ok(()) | Err(rewarm_container::Error::UnknownName { .. }) => return,
            // Its shim is about to end.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Runs `work`, which begins replicas by way of `begun`, until it is done or `interrupted` completes with the name of a
/// signal; then every replica is given up.
pub(crate) async fn unless_interrupted<T>(
    work: impl Future<Output = Result<T>>,
    interrupted: impl Future<Output = &'static str>,
    begun: &Begun,
    ground: &Ground,
    name: &str,
) -> Result<T> {
    let signal = tokio::select! {
        result = work => return result,
        signal = interrupted => signal,
    };
    let (begun, state) = (begun.clone(), ground.state.clone());
    let reason = format!("interrupted by {signal}");
    let giving_up = tokio::task::spawn_blocking(move || begun.give_up(&state, &reason));
    let given_up = giving_up.await.expect("giving replicas up does not panic");
    let stage = ground.clock.latest().unwrap_or(Stage::Admit);
    Err(Error { name: name.to_owned(), stage, cause: Cause::Interrupted { signal, given_up } })
}

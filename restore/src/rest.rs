//! What of a snapshot still arrives while its replicas are restored, and what its failure means for them.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future;
use rewarm_report::Stage;
use tokio::sync::oneshot;

use crate::error::Cause;
use crate::fetch::Fetching;
use crate::mode::Mode;

/// A ready replica waits for the rest of its snapshot if that arrives within this time: what nobody notices is worth never
/// having to be killed for a store that fails. Longer would hold back answers that could be given.
const WAIT_FOR_REST: Duration = Duration::from_millis(50);

/// How long the failure of a fetch may take to be told after what follows from it.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// The content that follows while replicas are restored, and how its fetch ended.
pub(crate) struct Rest {
    pub(crate) fetching: Option<Arc<Fetching>>,
    /// Why not even what CRIU insists on has arrived: nothing must be begun with it.
    pub(crate) failed: Option<Arc<Cause>>,
    done: futures::future::Shared<futures::future::BoxFuture<'static, std::result::Result<(), Arc<Cause>>>>,
}

impl Rest {
    pub(crate) fn start(fetched: std::result::Result<Option<Fetching>, Cause>) -> Self {
        let begun = fetched.map(|fetching| fetching.map(Arc::new)).map_err(Arc::new);
        let fetching = begun.as_ref().ok().cloned().flatten();
        let failed = begun.as_ref().err().cloned();
        let (end, ended) = oneshot::channel();
        // A thread of its own: it must go on whoever waits for it, and a runtime that can make no more threads would queue it
        // in front of the calls that restores wait for.
        let work = move || {
            let _ = end.send(match begun {
                Ok(Some(fetching)) => fetching.all().map_err(Arc::new),
                Ok(None) => Ok(()),
                Err(cause) => Err(cause),
            });
        };
        let done = match std::thread::Builder::new().name("restore-fetch".to_owned()).spawn(work) {
            Ok(_) => ended.map(|ended| ended.expect("fetching does not panic")).boxed(),
            Err(error) => {
                let doing = "start a thread, for which memory or the limit of processes is short";
                future::ready(Err(Arc::new(Cause::io(doing)(error)))).boxed()
            }
        };
        Self { fetching, failed, done: done.shared() }
    }

    /// Waits until everything has arrived, unless the mode or the time that it would take says otherwise.
    pub(crate) async fn enough(&self, mode: Mode) -> std::result::Result<(), (Stage, Cause)> {
        let soon = |fetching: &Arc<Fetching>| fetching.remaining() <= WAIT_FOR_REST;
        match mode {
            Mode::Lazy => Ok(()),
            Mode::Auto if !self.fetching.as_ref().is_none_or(soon) => Ok(()),
            Mode::Auto | Mode::Eager => self.all().await,
        }
    }

    /// Waits until everything has arrived.
    pub(crate) async fn all(&self) -> std::result::Result<(), (Stage, Cause)> {
        self.done.clone().await.map_err(|cause| (Stage::Fetch, cause.shared()))
    }

    /// Where the fetcher is lost, that is why; what followed from it is not.
    pub(crate) fn or_lost(&self, (stage, cause): (Stage, Cause)) -> (Stage, Cause) {
        let lost = self.fetching.as_ref().and_then(|fetching| fetching.stream.lost());
        lost.map_or((stage, cause), |error| (Stage::Fetch, error.into()))
    }

    /// Why a step failed, where the content says it better: a stream that was found damaged is gone, and whoever asks for it
    /// hears only that.
    pub(crate) async fn or_why(&self, failure: (Stage, Cause)) -> (Stage, Cause) {
        if matches!(failure.1, Cause::Fetcher(_))
            && !failure.1.lost()
            && let Ok(why) = tokio::time::timeout(WHY_WITHIN, self.failure()).await
        {
            return why;
        }
        self.or_lost(failure)
    }

    /// Completes only if something did not arrive.
    pub(crate) async fn failure(&self) -> (Stage, Cause) {
        match self.all().await {
            Err(failure) => failure,
            Ok(()) => std::future::pending().await,
        }
    }
}

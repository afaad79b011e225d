//! What program threads ask the reclaim worker to do for them, and wait for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};

use crate::reclaim::Hands;
use crate::space::{Space, World};
use crate::sys;

/// One step of a job, with the world held shared; true: that was the last.
type Step = Box<dyn FnMut(&Space, &World, &mut Hands) -> bool + Send>;

struct Job {
    step: std::sync::Mutex<Step>,
    done: AtomicU32,
}

/// The jobs that wait for the worker.
pub(crate) struct Jobs(sys::Mutex<VecDeque<Arc<Job>>>);

impl Default for Jobs {
    fn default() -> Self {
        Self(sys::Mutex::new(VecDeque::new()))
    }
}

impl Jobs {
    /// In a forked child: the parent's threads are not here.
    ///
    /// # Safety
    /// The caller is the only thread of the process.
    pub unsafe fn renew(&self) {
        // SAFETY: the caller's contract.
        unsafe { self.0.renew(VecDeque::new()) }
    }
}

impl Space {
    /// Has the worker run `step` on `state` until it says that it is done. Between two steps others get their turn: faults that
    /// wait for the world, forks. Where there is no worker yet, or this is a thread of the manager's, it runs here.
    pub(crate) fn on_worker<T: Send + 'static>(
        &self,
        state: T,
        mut step: impl FnMut(&Space, &World, &mut Hands, &mut T) -> bool + Send + 'static,
    ) -> T {
        let mut state = state;
        if !self.is_running() || self.faults.is_manager(sys::gettid()) {
            let mut hands = Hands::new();
            while !step(self, &self.world.read(), &mut hands, &mut state) {}
            return state;
        }
        let state = Arc::new(std::sync::Mutex::new(Some(state)));
        let theirs = Arc::clone(&state);
        let step: Step = Box::new(move |space, world, hands| {
            let mut state = theirs.lock().unwrap_or_else(PoisonError::into_inner);
            state.as_mut().is_none_or(|state| step(space, world, hands, state))
        });
        let job = Arc::new(Job { step: std::sync::Mutex::new(step), done: AtomicU32::new(0) });
        self.jobs.0.lock().push_back(Arc::clone(&job));
        self.wake_worker();
        // Acquire pairs with the worker's Release: what it has done is seen here.
        while job.done.load(Ordering::Acquire) == 0 {
            sys::futex_wait(&job.done, 0, None);
        }
        let state = state.lock().unwrap_or_else(PoisonError::into_inner).take();
        state.unwrap_or_else(|| sys::fatal("a finished job has lost its state"))
    }

    /// The worker's part: one step of one job. False: there is none.
    pub(crate) fn next_job(&self, world: &World, hands: &mut Hands) -> bool {
        let Some(job) = self.jobs.0.lock().pop_front() else { return false };
        let done = {
            let mut step = job.step.lock().unwrap_or_else(PoisonError::into_inner);
            step(self, world, hands)
        };
        if done {
            job.done.store(1, Ordering::Release);
            sys::futex_wake(&job.done, 1);
        } else {
            // Others' turn.
            self.jobs.0.lock().push_back(job);
        }
        true
    }
}

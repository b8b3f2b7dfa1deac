//! How a proxy stops: first no new flows, then, at the deadline, no flows at all.

use tokio::sync::watch;

/// The stages a pod's proxy goes through; they only move forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Running,
    /// Listeners are closed, tunnels were told to go away, flows may end by themselves.
    Draining,
    /// Whatever is left is cut.
    Cut,
}

/// Sets the stage.
#[derive(Debug)]
pub struct DrainHandle(watch::Sender<Stage>);

/// Sees the stage.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<Stage>);

/// A new drain, running.
pub fn drain() -> (DrainHandle, Drain) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (DrainHandle(sender), Drain(receiver))
}

impl DrainHandle {
    /// Moves on to `stage`, never back.
    pub fn advance(&self, stage: Stage) {
        self.0.send_if_modified(|current| {
            let forward = stage > *current;
            if forward {
                *current = stage;
            }
            forward
        });
    }
}

impl Drain {
    /// Waits until `stage` or a later one is reached; a vanished handle counts as `Cut`.
    pub async fn reached(&self, stage: Stage) {
        let _ = self.0.clone().wait_for(|current| *current >= stage).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stages_only_move_forward_and_a_lost_handle_cuts() {
        let (handle, drain) = drain();
        handle.advance(Stage::Cut);
        handle.advance(Stage::Draining);
        drain.reached(Stage::Cut).await;
        let (handle, drain) = super::drain();
        drop(handle);
        drain.reached(Stage::Cut).await;
    }
}

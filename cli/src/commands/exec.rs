//! `rewarm exec`
//!
//! The command gets this process's own stdin, stdout and stderr. Signals that are sent here reach it; its exit code
//! becomes this one's. If this process is killed, the shim ends the command.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use rewarm_container::shim::{Client, ExecOutput, ExecRequest};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Exec, Global};
use crate::failure::Cause;
use crate::replicas;

pub(crate) async fn run(args: &Exec, global: &Global) -> Result<u8, Cause> {
    // Watched before the command starts: a signal in between would otherwise end this process and with it the command.
    let mut signals = forwarded()?;
    let state = replicas::open(global)?;
    let client = replicas::connect(&state, &args.name)?;
    let request = ExecRequest {
        args: args.command.clone(),
        env: args.env.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        timeout_ms: None,
        stdio: true,
    };
    let (sender, receiver) = mpsc::channel();
    let over = sender.clone();
    let mut running = tokio::task::spawn_blocking(move || wait(&client, request, &over, &receiver));
    loop {
        tokio::select! {
            ended = &mut running => {
                let output = ended.expect("the client does not panic")?;
                return Ok(u8::try_from(output.code & 0xff).expect("masked"));
            }
            number = next(&mut signals) => {
                // The receiver is gone when the command has just ended.
                let _ = sender.send(Word::Signal(number));
            }
        }
    }
}

/// What the thread that sends signals is told.
enum Word {
    Signal(i32),
    Over,
}

/// Runs the command and waits for it, while another thread sends it the signals.
fn wait(
    client: &Arc<Client>,
    request: ExecRequest,
    over: &mpsc::Sender<Word>,
    words: &mpsc::Receiver<Word>,
) -> Result<ExecOutput, rewarm_container::Error> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let running = client.exec_start(request, Some([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]))?;
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let output = running.wait();
            // The loop below ends by this word; its receiver outlives this thread.
            let _ = over.send(Word::Over);
            output
        });
        while let Ok(Word::Signal(signal)) = words.recv() {
            if running.signal(signal).is_err() {
                break;
            }
        }
        waiting.join().expect("the client does not panic")
    })
}

fn forwarded() -> Result<Vec<(i32, Signal)>, Cause> {
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    kinds.into_iter().map(|kind| Ok((kind.as_raw_value(), signal(kind).map_err(Cause::Signals)?))).collect()
}

async fn next(signals: &mut [(i32, Signal)]) -> i32 {
    std::future::poll_fn(|context| {
        for (number, signal) in signals.iter_mut() {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*number);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

//! `squib snapshot create`: a client of the VM's control socket.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use crate::{
    api::{
        client::{Client, ClientError},
        types::{SnapshotCreateParams, SnapshotReport, SnapshotType},
    },
    args::{CreateArgs, DiskModeArg},
    commands::run::absolute,
    events,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
    output::{ByteBar, bytes, line, print_json},
    timings::phase_lines,
};

/// How often the VM is asked how far it is.
const ASK: Duration = Duration::from_millis(100);
/// The same where no one sees it: it is to notice that the VM is gone.
const ASK_UNSEEN: Duration = Duration::from_secs(1);

pub(crate) fn create(args: &CreateArgs) -> Result<Code> {
    let socket = Home::find().and_then(|home| home.socket(&args.vm)).code(Code::Control)?;
    let client = Client::new(&socket);
    // The VM gives the snapshot up when nobody waits for it any more.
    events::end_on_signal(|| ())?;
    let params = SnapshotCreateParams {
        // The VM's working directory is not ours.
        snapshot_path: absolute(&args.output)?,
        mem_file_path: None,
        snapshot_type: args.diff.as_ref().map(|_| SnapshotType::Diff),
        parent_path: args.diff.as_deref().map(absolute).transpose()?,
        force: args.force,
        stop: args.stop,
        live: args.live,
        with_kernel: args.with_kernel,
        disk_mode: args.disk_modes.iter().flat_map(DiskModeArg::params).collect(),
        no_reflink: args.no_reflink,
        level: args.level,
        chunk_size: args.chunk_size,
        threads: args.threads,
        durability: Some(args.durability),
    };
    let report = request(&client, params)?;
    if args.json {
        print_json(&report)?;
    } else {
        show(&report, args.timings);
    }
    Ok(Code::Done)
}

/// Sends the request, and shows how far it is while the answer is on its way. A VM that no longer tells how far it is
/// has been stopped, or hangs.
fn request(client: &Client, params: SnapshotCreateParams) -> Result<SnapshotReport> {
    let (sender, answer) = mpsc::channel();
    let caller = client.clone();
    thread::Builder::new()
        .name("create".into())
        .spawn(move || drop(sender.send(caller.snapshot(&params))))?;
    let bar = ByteBar::new("snapshot");
    let pause = if bar.is_shown() { ASK } else { ASK_UNSEEN };
    loop {
        match answer.recv_timeout(pause) {
            Ok(answer) => return answer.map_err(failure),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the thread sends an answer before it ends")
            }
        }
        match client.progress() {
            Ok(progress) if progress.total > 0 => {
                bar.name(&progress.phase);
                bar.set(progress.done, progress.total, progress.stored);
            }
            // The answer may have come in the last moment.
            Err(error @ ClientError::NoAnswer { .. }) => {
                return answer.try_recv().unwrap_or(Err(error)).map_err(failure);
            }
            // The answer tells more than these.
            Ok(_) | Err(_) => {}
        }
    }
}

fn failure(error: ClientError) -> Failure {
    let code = match error {
        ClientError::Fault { .. } => Code::Snapshot,
        ClientError::Connect { .. } | ClientError::NoAnswer { .. } => Code::Control,
        ClientError::Host { .. } => Code::Failed,
    };
    Failure::new(code, error)
}

fn show(report: &SnapshotReport, timings: bool) {
    line!("snapshot  {}", report.path.display());
    line!("id        {}", report.id);
    line!(
        "stored    {} for {} of memory and disks (1:{:.1})",
        bytes(report.stored_bytes),
        bytes(report.raw_bytes),
        report.raw_bytes as f64 / report.stored_bytes.max(1) as f64
    );
    line!("memory    {}", report.memory_digest);
    for disk in &report.disks {
        line!("disk {:<4} {}  {}", disk.id, disk.digest, bytes(disk.bytes));
    }
    if timings {
        for line in phase_lines(&report.timings) {
            line!("{line}");
        }
        line!("{:<28} {:>10.3} ms", "= the guest stood still", report.downtime_ms);
    }
}

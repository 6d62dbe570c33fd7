//! `squib snapshot create`: a client of the VM's control socket.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use squib_formats::image::is_chunk_size;

use crate::{
    api::{
        client::{Client, ClientError},
        types::{SnapshotCreateParams, SnapshotReport, SnapshotType},
    },
    args::{CreateArgs, DiskModeArg, Size},
    commands::run::absolute,
    events,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
    output::{ByteBar, bytes, line, print_json},
    timings::phase_lines,
};

/// How often the VM is asked how far it is.
const ASK: Duration = Duration::from_millis(100);

pub(crate) fn create(args: &CreateArgs) -> Result<Code> {
    let socket = Home::open().and_then(|home| home.socket(&args.vm)).code(Code::Control)?;
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
        chunk_size: args.chunk_size.map(chunk_size).transpose()?,
        threads: args.threads,
        durability: Some(args.durability),
    };
    let report = request(&client, params).map_err(failure)?;
    if args.json {
        print_json(&report)?;
    } else {
        show(&report, args.timings);
    }
    Ok(Code::Done)
}

fn chunk_size(size: Size) -> Result<u32> {
    u32::try_from(size.0).ok().filter(|size| is_chunk_size(*size)).ok_or_else(|| {
        let why = "--chunk-size: a power of two from 16K to 4M is expected";
        Failure::new(Code::Usage, anyhow::anyhow!(why))
    })
}

/// Sends the request, and shows how far it is while the answer is on its way.
fn request(
    client: &Client,
    params: SnapshotCreateParams,
) -> std::result::Result<SnapshotReport, ClientError> {
    let (sender, answer) = mpsc::channel();
    let caller = client.clone();
    thread::spawn(move || drop(sender.send(caller.snapshot(&params))));
    let bar = ByteBar::new("snapshot");
    loop {
        match answer.recv_timeout(ASK) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the thread sends an answer before it ends")
            }
        }
        if bar.is_shown()
            && let Ok(progress) = client.progress()
            && progress.total > 0
        {
            bar.name(&progress.phase);
            bar.set(progress.done, progress.total, progress.stored);
        }
    }
}

fn failure(error: ClientError) -> Failure {
    let code = match error {
        ClientError::Fault { .. } => Code::Snapshot,
        ClientError::Connect { .. } | ClientError::NoAnswer { .. } => Code::Control,
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

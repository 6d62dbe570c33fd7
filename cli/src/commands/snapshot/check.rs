//! `squib snapshot check`.

use squib_snapshot::{
    ChangedDisks,
    check::{CheckOptions, Line, Report, Verdict, check as examine},
    observe::Run,
};

use squib_vmm::machine::RestoreOptions;

use crate::{
    args::CheckArgs,
    commands::{
        run::{absolute, backend},
        snapshot::restore::{disk_load, memory_load},
    },
    events,
    exit::{Code, Result, WithCode},
    home::Home,
    output::{ByteBar, line, print_json},
};

pub(crate) fn check(args: &CheckArgs) -> Result<Code> {
    let cancel = events::give_up_on_signals()?;
    let disk_dir = match &args.disk_dir {
        Some(dir) => absolute(dir)?,
        // Where a restore puts the disks unless it is told otherwise.
        None => Home::find().code(Code::Failed)?.disks().to_owned(),
    };
    let bar = ByteBar::new("check");
    let options = CheckOptions {
        backend: args.backend.as_deref().map(backend).transpose()?,
        disk_dir: Some(disk_dir),
        disk_places: args.disks.iter().map(|d| (d.id.clone(), d.path.clone())).collect(),
        allowed_disks: args.allowed_disks.clone(),
        changed_disks: match args.allow_changed_disks {
            true => ChangedDisks::Accept,
            false => ChangedDisks::Refuse,
        },
        parents: args.chain.parents.clone(),
        memory: memory_load(args.mode)?,
        disks: disk_load(args.mode, args.disk_dir.is_some()),
        overcommit: args.overcommit,
        machine: RestoreOptions::default(),
        run: Run { observer: &bar, cancel, ..Run::default() },
    };
    let report = examine(&args.dir, &options).map_err(events::failure);
    drop(bar);
    let report = report?;
    if args.json {
        print_json(&report)?;
    } else {
        show(&report);
    }
    Ok(if report.accepted { Code::Done } else { Code::Snapshot })
}

fn show(report: &Report) {
    let Report { path, id, accepted, lines } = report;
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    line!("snapshot  {}", path.display());
    if let Some(id) = id {
        line!("id        {id}");
    }
    for Line { what, verdict, found, advice } in lines {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Differs => "differs",
            Verdict::Missing => "missing",
            Verdict::Unsure => "unsure",
        };
        line!("{verdict:<8}  {what:<width$}  {found}");
        if let Some(advice) = advice {
            line!("{:<8}  {:<width$}  -> {advice}", "", "");
        }
    }
    let count =
        |wanted: &[Verdict]| lines.iter().filter(|line| wanted.contains(&line.verdict)).count();
    let wrong = count(&[Verdict::Differs, Verdict::Missing]);
    match accepted {
        true if count(&[Verdict::Unsure]) > 0 => {
            line!("a restore would be tried: nothing is known to stand in its way");
        }
        true => line!("a restore would be accepted"),
        false => line!("a restore would be refused: {wrong} of {} lines", lines.len()),
    }
}

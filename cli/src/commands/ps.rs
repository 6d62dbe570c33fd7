//! `squib ps`.

use serde::Serialize;

use crate::{
    api::{client::Client, types::InstanceState},
    args::PsArgs,
    exit::{Code, Result, WithCode},
    home::{Home, VmRecord},
    output::{line, print_json},
};

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    record: VmRecord,
    /// `None` for a VM that does not answer.
    state: Option<InstanceState>,
}

pub(crate) fn ps(args: &PsArgs) -> Result<Code> {
    let running = Home::open().and_then(|home| home.running()).code(Code::Failed)?;
    let lines: Vec<Line> = running
        .into_iter()
        .map(|record| {
            let state = Client::new(&record.socket).info().ok().map(|info| info.state);
            Line { record, state }
        })
        .collect();
    if args.json {
        print_json(&lines)?;
        return Ok(Code::Done);
    }
    line!("{:<20} {:>8}  {:<12} SOCKET", "NAME", "PID", "STATE");
    for Line { record, state } in lines {
        let state = match state {
            Some(InstanceState::NotStarted) => "not started",
            Some(InstanceState::Running) => "running",
            Some(InstanceState::Paused) => "paused",
            None => "no answer",
        };
        line!("{:<20} {:>8}  {state:<12} {}", record.name, record.pid, record.socket.display());
    }
    Ok(Code::Done)
}

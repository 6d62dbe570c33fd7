//! `squib ps`.

use std::time::Duration;

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

/// How long the VMs may take to answer, all together.
const WAIT: Duration = Duration::from_secs(1);

pub(crate) fn ps(args: &PsArgs) -> Result<Code> {
    let running = Home::find().and_then(|home| home.running()).code(Code::Failed)?;
    let client = |record: &VmRecord| Client::new(&record.socket).within(WAIT);
    let clients: Vec<Client> = running.iter().map(client).collect();
    let answers = Client::info_of_all(&clients).code(Code::Failed)?;
    let states = answers.into_iter().map(|info| Some(info.ok()?.state));
    let lines: Vec<Line> =
        running.into_iter().zip(states).map(|(record, state)| Line { record, state }).collect();
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

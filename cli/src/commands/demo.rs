//! `squib demo`.

use crate::{
    args::DemoArgs,
    exit::{Code, Failure, Result},
};

pub(crate) fn demo(_args: &DemoArgs) -> Result<Code> {
    Err(Failure::new(Code::Failed, anyhow::anyhow!("the demo is not built yet")))
}

//! `squib kit`.

use crate::{
    args::{FetchArgs, KitCommand, KitFile},
    events::end_on_signal,
    exit::{Code, Failure, Result, WithCode},
    kit::{self, FetchOptions, Kit},
    output::{Spinner, line, print_json},
};

pub(crate) fn kit(command: KitCommand) -> Result<Code> {
    match command {
        KitCommand::Fetch(args) => fetch(args),
        KitCommand::Path { file } => path(file),
    }
}

fn path(file: KitFile) -> Result<Code> {
    let missing = |fetch: &str| {
        Failure::new(
            Code::Failed,
            anyhow::anyhow!("not in the cache: `squib kit {fetch}` makes it"),
        )
    };
    let kit = Kit::cached().code(Code::Failed)?.ok_or_else(|| missing("fetch"))?;
    let path = match file {
        KitFile::Kernel => kit.kernel,
        KitFile::Initrd => kit.initrd,
        KitFile::Rootfs => kit.rootfs.ok_or_else(|| missing("fetch --rootfs"))?,
    };
    line!("{}", path.display());
    Ok(Code::Done)
}

fn fetch(args: FetchArgs) -> Result<Code> {
    end_on_signal(kit::abandon)?;
    let spinner = Spinner::new("the guest kit");
    let options = FetchOptions {
        mirror: args.mirror,
        rootfs: args.rootfs,
        refresh: args.refresh,
        ..FetchOptions::default()
    };
    let kit = Kit::fetch(&options, &|what| spinner.say(what)).code(Code::Failed)?;
    drop(spinner);
    if args.json {
        print_json(&kit)?;
    } else {
        line!("release  {}", kit.release);
        line!("kernel   {}", kit.kernel.display());
        line!("initrd   {}", kit.initrd.display());
        if let Some(rootfs) = &kit.rootfs {
            line!("rootfs   {}", rootfs.display());
        }
    }
    Ok(Code::Done)
}

//! The `squib` command.

fn main() -> std::process::ExitCode {
    squib::main()
}

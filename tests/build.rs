//! Ends a build that is of no use before it has begun.

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let hardware = var("CARGO_FEATURE_HVF_HARDWARE").is_ok();
    let target = |name: &str| var(name).unwrap_or_default();
    let mac =
        target("CARGO_CFG_TARGET_OS") == "macos" && target("CARGO_CFG_TARGET_ARCH") == "aarch64";
    if hardware && !mac {
        println!(
            "cargo::error=hvf-hardware: these tests run on Hypervisor.framework, on a Mac with Apple silicon and \
             macOS 15 or later (docs/macos.md); `cargo test -p squib-hvf-stand-in` runs them on a stand-in anywhere"
        );
    }
}

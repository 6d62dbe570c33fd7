//! `cli/sign`, which signs for Hypervisor.framework, with stand-ins for the programs that sign.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A folder with programs, of which `bin` is the path.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(place.at("bin")).unwrap();
        // All that the script needs of the system, so that no other program that signs is found.
        for tool in ["sh", "dirname", "grep"] {
            let found = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool));
            let found = found.iter().find(|path| path.exists()).unwrap();
            std::os::unix::fs::symlink(found, place.at("bin").join(tool)).unwrap();
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str, lines: &str) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A `codesign` that writes down what it signs, and tells of it as the real one does.
    fn codesign(&self) {
        let log = self.at("log").display().to_string();
        self.program(
            "bin/codesign",
            &format!(
                "for last; do :; done\n\
                 case $1 in\n\
                 --display) grep -q \" $last\\$\" {log} && echo '<key>com.apple.security.hypervisor</key>' ;;\n\
                 --verify) grep -q \" $last\\$\" {log} ;;\n\
                 *) echo \"$@\" >> {log} ;;\n\
                 esac"
            ),
        );
        fs::write(log, "").unwrap();
    }

    fn signed(&self) -> String {
        fs::read_to_string(self.at("log")).unwrap_or_default()
    }

    fn sign(&self, words: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("sign");
        Command::new(script)
            .args(words)
            .current_dir(self.0.path())
            .env("PATH", self.at("bin"))
            .env_remove("IDENTITY")
            .output()
            .unwrap()
    }
}

#[test]
fn a_program_is_signed_once_with_the_entitlement() {
    let place = Place::new();
    place.codesign();
    place.program("prog", "");
    for _ in 0..2 {
        let out = place.sign(&["prog"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let signed = place.signed();
    assert_eq!(signed.lines().count(), 1, "{signed}");
    assert!(signed.starts_with("--force --sign - --entitlements "), "{signed}");
    assert!(signed.ends_with("squib.entitlements prog\n"), "{signed}");
}

#[test]
fn elsewhere_than_on_a_mac_rcodesign_signs() {
    let place = Place::new();
    let log = place.at("log").display().to_string();
    place.program("bin/rcodesign", &format!("echo \"$@\" >> {log}"));
    place.program("prog", "");
    assert!(place.sign(&["prog"]).status.success());
    let signed = place.signed();
    assert!(signed.starts_with("sign --entitlements-xml-path "), "{signed}");
}

#[test]
fn without_a_program_that_signs_it_is_said_which_there_are() {
    let place = Place::new();
    place.program("prog", "");
    let out = place.sign(&["prog"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("codesign"), "{said}");
    assert!(said.contains("cargo install apple-codesign"), "{said}");
}

#[test]
fn the_runner_signs_what_uses_the_framework_and_hands_everything_on() {
    let place = Place::new();
    place.codesign();
    place.program("deps/unit-0123", "echo \"got $1,$2\"; exit 7");
    place.program("deps/hvf_hardware-0123", "exit 3");
    let out = place.sign(&["--run", "deps/unit-0123", "a b", "c"]);
    assert_eq!(out.status.code(), Some(7), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "got a b,c\n");
    assert_eq!(place.signed(), "", "nothing there uses the framework");
    // The program that tests start lies beside their folder.
    place.program("squib", "");
    let out = place.sign(&["--run", "deps/hvf_hardware-0123"]);
    assert_eq!(out.status.code(), Some(3));
    let signed = place.signed();
    assert!(signed.contains("deps/hvf_hardware-0123\n"), "{signed}");
    assert!(signed.contains("deps/../squib\n"), "{signed}");
}

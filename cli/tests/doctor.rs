//! `squib doctor` says whether a VM can run, and ends accordingly.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use serde_json::Value;

/// Asks with the two folders, and answers the exit code and the report.
fn ask(home: &Path, cache: &Path) -> (Option<i32>, Value) {
    let out = Command::new(env!("CARGO_BIN_EXE_squib"))
        .args(["doctor", "--json"])
        .env("SQUIB_HOME", home)
        .env("SQUIB_CACHE", cache)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&out.stdout).unwrap_or_else(|error| {
        panic!("{error}\n{}", String::from_utf8_lossy(&out.stderr));
    });
    (out.status.code(), report)
}

fn status<'a>(report: &'a Value, name: &str) -> &'a str {
    property(report, name)["status"].as_str().unwrap_or_else(|| panic!("{report:#}"))
}

fn property<'a>(report: &'a Value, name: &str) -> &'a Value {
    let properties = report["properties"].as_array().unwrap();
    let found = properties.iter().find(|property| property["name"] == name);
    found.unwrap_or_else(|| panic!("{report:#}"))
}

#[test]
fn a_machine_with_its_folders_can_run_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (code, report) = ask(&dir.path().join("home"), &dir.path().join("cache"));
    assert_eq!((code, &report["can_run"]), (Some(0), &Value::Bool(true)), "{report:#}");
    for name in ["backend soft", "run folder", "state folder", "cache folder", "templates"] {
        assert_eq!(status(&report, name), "ok", "{report:#}");
    }
    assert_eq!(status(&report, "guest kit"), "note");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "it has only looked");
}

#[test]
fn a_shared_folder_is_named_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o777)).unwrap();
    let (code, report) = ask(&home, &home);
    assert_eq!((code, &report["can_run"]), (Some(1), &Value::Bool(false)), "{report:#}");
    for name in ["run folder", "socket path", "templates", "guest kit"] {
        assert_eq!(status(&report, name), "missing", "{report:#}");
        let found = property(&report, name)["found"].to_string();
        assert!(found.contains(&format!("chmod go-w {}", home.display())), "{found}");
    }
    assert_eq!(fs::metadata(&home).unwrap().permissions().mode() & 0o777, 0o777);
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
}

#[test]
#[cfg(not(target_os = "macos"))]
fn what_the_framework_needs_is_said_where_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (_, report) = ask(&dir.path().join("home"), &dir.path().join("cache"));
    let properties = report["properties"].as_array().unwrap();
    let hvf = properties.iter().find(|property| property["name"] == "backend hvf").unwrap();
    assert_eq!(hvf["status"], "missing");
    assert!(hvf["found"].as_str().unwrap().contains("macOS 15 or later on Apple silicon"), "{hvf}");
    assert_eq!(hvf["advice"], "use --backend soft");
}

#[test]
fn without_a_place_for_a_vm_none_can_run() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let (code, report) = ask(&file.join("home"), &dir.path().join("cache"));
    assert_eq!((code, &report["can_run"]), (Some(1), &Value::Bool(false)), "{report:#}");
    assert_eq!(status(&report, "run folder"), "missing");
    assert_eq!(status(&report, "cache folder"), "ok");
}

#[test]
fn without_a_cache_a_vm_can_run() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let (code, report) = ask(&dir.path().join("home"), &file.join("cache"));
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(status(&report, "cache folder"), "missing");
}

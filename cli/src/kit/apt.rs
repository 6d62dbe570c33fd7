//! Packages of another architecture from the machine's own Debian mirror, without root: `apt-get`
//! with lists, cache and status of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::KitError;

/// Where the archive is looked for when the machine is not Debian's.
const DEBIAN: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The release with the 6.12 kernel.
const SUITE: &str = "trixie";

/// An apt of our own for arm64 packages.
pub(super) struct Apt {
    dir: PathBuf,
    /// The line that the packages come from, for messages.
    source: String,
}

impl Apt {
    /// Whether the programs are installed.
    pub(super) fn check_tools() -> Result<(), KitError> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            require(tool, "apt and dpkg, which come with Debian and Ubuntu")?;
        }
        Ok(())
    }

    /// Prepares `dir` and loads the package lists.
    pub(super) fn open(dir: &Path, mirror: Option<&str>) -> Result<Self, KitError> {
        Self::check_tools()?;
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).map_err(|e| KitError::io(&dir.join(sub), e))?;
        }
        let status = dir.join("state/status");
        fs::write(&status, "").map_err(|e| KitError::io(&status, e))?;
        let release = OsRelease::read();
        let site = match mirror {
            Some(mirror) => mirror.trim_end_matches('/').to_owned(),
            None if release.id == "debian" => own_mirror().unwrap_or_else(|| DEBIAN.to_owned()),
            None => DEBIAN.to_owned(),
        };
        let keyring = keyring(dir)?;
        // The machine's own release is the second choice: a private mirror may hold nothing else.
        let mut suites = vec![SUITE.to_owned()];
        if release.id == "debian" && !release.codename.is_empty() && release.codename != SUITE {
            suites.push(release.codename);
        }
        let mut last = None;
        for suite in suites {
            let source = format!("deb [signed-by={}] {site} {suite} main", keyring.display());
            let apt = Self { dir: dir.to_owned(), source };
            match apt.update() {
                Ok(()) => return Ok(apt),
                Err(e) => last = Some(e),
            }
        }
        Err(last.expect("there is at least one suite"))
    }

    /// The value of `field` in the newest record of `package`.
    pub(super) fn field(&self, package: &str, field: &str) -> Result<String, KitError> {
        let unknown = || KitError::NoPackage {
            package: package.to_owned(),
            source_line: self.source.clone(),
        };
        let out = match self.run("apt-cache", &["show", package]) {
            // That is how it says that it has no such package, or no lists at all.
            Err(KitError::Tool { .. }) => return Err(unknown()),
            out => out?,
        };
        let prefix = format!("{field}: ");
        out.lines()
            .find_map(|line| line.strip_prefix(&prefix))
            .map(|value| value.trim().to_owned())
            .ok_or_else(unknown)
    }

    /// Everything that an empty machine needs for `packages`, themselves included, in apt's order.
    pub(super) fn closure(&self, packages: &[&str]) -> Result<Vec<Package>, KitError> {
        let mut args = vec!["-q", "--simulate", "--no-install-recommends", "install"];
        args.extend(packages);
        let out = self.run("apt-get", &args)?;
        // "Inst libc6 (2.41-12 Debian:13/stable [arm64])"
        let closure: Vec<Package> = out
            .lines()
            .filter_map(|line| {
                let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
                let version = rest.split_whitespace().next()?;
                Some(Package { name: name.to_owned(), version: version.to_owned() })
            })
            .collect();
        if closure.is_empty() {
            return Err(KitError::NoPackage {
                package: packages.join(" "),
                source_line: self.source.clone(),
            });
        }
        Ok(closure)
    }

    /// Downloads `packages` into the empty directory `into`; apt checks signature and digests.
    pub(super) fn download(&self, packages: &[String], into: &Path) -> Result<(), KitError> {
        let mut command = self.command("apt-get");
        command.args(["-q", "download"]).args(packages).current_dir(into);
        output(command).map(drop)
    }

    fn update(&self) -> Result<(), KitError> {
        let list = self.dir.join("sources.list");
        fs::write(&list, format!("{}\n", self.source)).map_err(|e| KitError::io(&list, e))?;
        // apt-get ends with success when nothing could be fetched, and with failure when a hook of
        // the machine's own did not like it: what counts is whether the package is known afterwards.
        let update = self.run("apt-get", &["-q", "-o", "APT::Update::Error-Mode=any", "update"]);
        match (self.field(super::KERNEL_PACKAGE, "Version"), update) {
            (Ok(_), _) => Ok(()),
            (Err(_), Err(KitError::Tool { complaint, .. })) if is_unreachable(&complaint) => {
                Err(KitError::Unreachable { source_line: self.source.clone(), complaint })
            }
            (Err(missing), update) => Err(update.err().unwrap_or(missing)),
        }
    }

    fn run(&self, program: &'static str, args: &[&str]) -> Result<String, KitError> {
        let mut command = self.command(program);
        command.args(args);
        output(command)
    }

    fn command(&self, program: &str) -> Command {
        let dir = self.dir.display();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        for option in [
            "APT::Architecture=arm64".to_owned(),
            "APT::Architectures=arm64".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
            "Acquire::Retries=3".to_owned(),
            format!("Dir::State={dir}/state"),
            format!("Dir::State::Lists={dir}/state/lists"),
            format!("Dir::State::status={dir}/state/status"),
            format!("Dir::Cache={dir}/cache"),
            format!("Dir::Etc::SourceList={dir}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Whether apt complains that it cannot reach the archive.
fn is_unreachable(complaint: &str) -> bool {
    const SAID: [&str; 8] = [
        "Could not resolve",
        "Could not connect",
        "Cannot initiate the connection",
        "Unable to connect",
        "Temporary failure resolving",
        "Connection failed",
        "Connection refused",
        "Connection timed out",
    ];
    SAID.iter().any(|said| complaint.contains(said))
}

/// One package at one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
}

/// The downloaded packages in `dir`.
pub(super) fn debs(dir: &Path) -> Result<Vec<PathBuf>, KitError> {
    let mut debs = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| KitError::io(dir, e))? {
        let path = entry.map_err(|e| KitError::io(dir, e))?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            debs.push(path);
        }
    }
    debs.sort();
    Ok(debs)
}

/// Unpacks the files of `deb` into `into`.
pub(super) fn extract(deb: &Path, into: &Path) -> Result<(), KitError> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(deb).arg(into);
    output(command).map(drop)
}

/// Runs `command` to its end; its output, or an error with what it complained about.
pub(super) fn output(mut command: Command) -> Result<String, KitError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| KitError::Spawn { program: program.clone(), source })?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&out.stderr);
    let lines: Vec<&str> = complaint.lines().filter(|l| !l.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(5)..].join("; ");
    Err(KitError::Tool { program, status: out.status.to_string(), complaint: tail })
}

/// Where `tool` is, or an error with advice.
pub(super) fn require(tool: &'static str, comes_with: &'static str) -> Result<PathBuf, KitError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps the sbin directories out of a plain user's PATH.
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(tool))
        .find(|path| path.is_file())
        .ok_or(KitError::NoTool { tool, comes_with })
}

/// The Debian archive that this machine is configured for.
fn own_mirror() -> Option<String> {
    let mut command = Command::new("apt-get");
    command.args(["update", "--print-uris"]).env("LC_ALL", "C");
    let uris = output(command).ok()?;
    main_archive(&uris)
}

/// The first archive in `apt-get update --print-uris` that serves a whole release, not updates or
/// security fixes to one, and that is Debian's: third-party repositories keep other suites.
fn main_archive(uris: &str) -> Option<String> {
    uris.lines().find_map(|line| {
        let uri = line.strip_prefix('\'')?.split('\'').next()?;
        let (site, rest) = uri.split_once("/dists/")?;
        let suite = rest.strip_suffix("/InRelease")?;
        let ours = site.trim_end_matches('/').ends_with("debian") && !suite.contains(['-', '/']);
        ours.then(|| site.to_owned())
    })
}

/// Debian's archive keys: the machine's, or those of the keyring package that the machine's own
/// archive vouches for (Ubuntu carries it).
fn keyring(dir: &Path) -> Result<PathBuf, KitError> {
    if Path::new(KEYRING).is_file() {
        return Ok(KEYRING.into());
    }
    let place = dir.join("keyring");
    let found = place.join(KEYRING.trim_start_matches('/'));
    if !found.is_file() {
        fs::create_dir_all(&place).map_err(|e| KitError::io(&place, e))?;
        let mut command = Command::new("apt-get");
        command.args(["-q", "-o", "APT::Sandbox::User=", "download", "debian-archive-keyring"]);
        command.current_dir(&place);
        output(command).map_err(|e| KitError::NoKeyring { source: Box::new(e) })?;
        for deb in debs(&place)? {
            extract(&deb, &place)?;
        }
    }
    Ok(found)
}

struct OsRelease {
    id: String,
    codename: String,
}

impl OsRelease {
    fn read() -> Self {
        let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .map(|v| v.trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        Self { id: value("ID"), codename: value("VERSION_CODENAME") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_of_a_whole_debian_release_is_taken() {
        let uris = "\
'https://repo.example/node/dists/nodistro/InRelease' a 0
'http://mirror.example/debian-security/dists/bookworm-security/InRelease' b 0
'http://mirror.example/debian/dists/bookworm-updates/InRelease' c 0
'http://mirror.example/debian/dists/bookworm/InRelease' d 0
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' e 0
";
        assert_eq!(main_archive(uris).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(main_archive("Reading package lists...\n"), None);
    }
}

//! The control socket: made so that only the user ever gets in.

use std::{
    fs, io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
        net::UnixListener,
    },
    path::Path,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket},
};

use super::HomeError;

/// Room for a path in `sockaddr_un`, its closing zero byte not counted.
pub(super) const SOCKET_PATH_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };
/// Length of what [`listen`] puts beside the socket for a moment: `.PID/s`.
pub(super) const STAGE_MAX: usize = ".4194304/s".len();
/// Name of the socket there.
pub(super) const STAGED: &str = "s";

/// Listens on `path` with mode 0600. A socket without a listener is replaced.
pub fn listen(path: &Path) -> Result<UnixListener, HomeError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(HomeError::SocketPath { path: path.to_owned() });
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(HomeError::NotASocket { path: path.to_owned() });
        }
        Ok(_) if is_stale(path) => fs::remove_file(path).map_err(|e| HomeError::io(path, e))?,
        Ok(_) => return Err(HomeError::SocketInUse { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(HomeError::io(path, e)),
    }
    // Between bind and chmod any user could connect: so both happen in a folder that others cannot enter.
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stage = parent.join(format!(".{}", std::process::id()));
    let staged = stage.join(STAGED);
    if staged.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(HomeError::SocketPath { path: path.to_owned() });
    }
    fs::DirBuilder::new().mode(0o700).create(&stage).map_err(|e| HomeError::io(parent, e))?;
    let listener = UnixListener::bind(&staged).and_then(|listener| {
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o600))?;
        fs::rename(&staged, path)?;
        Ok(listener)
    });
    let _ = fs::remove_file(&staged);
    let _ = fs::remove_dir(&stage);
    listener.map_err(|e| HomeError::io(path, e))
}

/// Whether no process listens on the socket any more. Does not wait for one that takes no more connections.
fn is_stale(path: &Path) -> bool {
    let tried = SocketAddrUnix::new(path).and_then(|address| {
        let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        connect(&socket, &address)
    });
    tried == Err(Errno::CONNREFUSED)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_socket_on_which_somebody_listens_is_not_taken_over_and_a_stale_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(HomeError::SocketInUse { .. })));
        drop(listener);
        listen(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_place_of_the_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(HomeError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_path_that_no_socket_address_holds_is_refused_by_length() {
        let path = Path::new("/tmp").join("x".repeat(SOCKET_PATH_MAX));
        let error = listen(&path).unwrap_err();
        assert!(matches!(error, HomeError::SocketPath { .. }), "{error}");
    }

    #[test]
    fn a_socket_whose_process_takes_no_more_connections_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // Nothing accepts: in the end the line is full, and a connection would wait.
        let _listener = listen(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
            rustix::io::ioctl_fionbio(&socket, true).unwrap();
            if connect(&socket, &SocketAddrUnix::new(&path).unwrap()).is_err() {
                break;
            }
            waiting.push(socket);
            assert!(waiting.len() < 10_000);
        }
        assert!(matches!(listen(&path), Err(HomeError::SocketInUse { .. })));
    }
}

//! The program under the names that mount(8) and umount(8) call: `mount.fuse.ploopfs`,
//! `mount.ploopfs`, `umount.fuse.ploopfs`, `umount.ploopfs`.
//!
//! Imports: `error`, `fuse`.
//! Never: needs an environment (mount(8) passes none); calls mount(8) or umount(8), which would
//! call it again.
//!
//! `mount.fuse3`, where no helper of ours is installed, calls `ploopfs IMAGE MOUNTPOINT -o OPTIONS`
//! instead, without a verb; that is the same request.

use super::args::{Format, MountArgs, SelectArgs, ServeArgs};
use super::exit;
use super::output::Report;
use super::{mount, umount};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const USAGE: &str = "usage: mount.fuse.ploopfs IMAGE MOUNTPOINT [-sfnvrw] [-o OPTIONS]";

/// What a name asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// mount(8)'s helper.
    Mount,
    /// umount(8)'s.
    Umount,
}

/// The role that the program was called in, if it is a helper's.
#[must_use]
pub fn role(args: &[OsString]) -> Option<Role> {
    let name = Path::new(args.first()?).file_name()?.to_str()?;
    match name {
        "mount.fuse.ploopfs" | "mount.ploopfs" => return Some(Role::Mount),
        "umount.fuse.ploopfs" | "umount.ploopfs" => return Some(Role::Umount),
        _ => {}
    }
    match args {
        [_, image, _, dash_o, _] if dash_o == "-o" && image.as_bytes().contains(&b'/') => {
            Some(Role::Mount)
        }
        _ => None,
    }
}

/// What mount(8) asked for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    names: Vec<PathBuf>,
    options: Vec<OsString>,
    fake: bool,
    lazy: bool,
}

fn parse(args: &[OsString], role: Role) -> Result<Request, String> {
    let mut request = Request::default();
    let mut rest = args.iter().skip(1);
    while let Some(word) = rest.next() {
        let Some(letters) = word.as_bytes().strip_prefix(b"-").filter(|l| !l.is_empty()) else {
            request.names.push(PathBuf::from(word));
            continue;
        };
        if letters == b"-" {
            request.names.extend(rest.by_ref().map(PathBuf::from));
            break;
        }
        let mut letters = letters;
        while let Some((letter, after)) = letters.split_first() {
            letters = after;
            match (letter, role) {
                (b'r', Role::Mount) => request.options.push("ro".into()),
                (b'w', Role::Mount) => request.options.push("rw".into()),
                (b'f', Role::Mount) => request.fake = true,
                (b'l', Role::Umount) => request.lazy = true,
                (b's' | b'n' | b'v', _) | (b'f' | b'r', Role::Umount) => {}
                // The rest of the word, or the next one, is the value.
                (b'o' | b't' | b'N', _) => {
                    let value = match after {
                        [] => rest.next().cloned().ok_or("an option lacks its value")?,
                        after => OsStr::from_bytes(after).to_owned(),
                    };
                    if *letter == b'o' {
                        request.options.push(value);
                    }
                    letters = &[];
                }
                _ => return Err(format!("unknown option -{}", char::from(*letter))),
            }
        }
    }
    Ok(request)
}

/// Runs as a helper and gives the exit status that mount(8) knows.
#[must_use]
pub fn run(role: Role, args: &[OsString]) -> u8 {
    let result = parse(args, role)
        .map_err(|why| Report::usage(USAGE, why))
        .and_then(|request| match role {
            Role::Mount => run_mount(&request),
            Role::Umount => run_umount(&request),
        });
    match result {
        Ok(()) => 0,
        Err(report) => {
            report.print(false);
            report.helper_status
        }
    }
}

fn run_mount(request: &Request) -> Result<(), Box<Report>> {
    let [image, mountpoint] = request.names.as_slice() else {
        return Err(Report::usage(USAGE, "an image and a mountpoint are needed"));
    };
    let args = MountArgs {
        serve: ServeArgs {
            read_only: false,
            foreground: false,
            debug: false,
            options: request.options.clone(),
            pid_file: None,
            replace_dead: false,
            drop_bitmaps: false,
            trust_header: false,
            no_reflink: false,
            direct: false,
            grow_step: None,
            enospc: None,
            flush_interval: None,
            bat_cache: None,
            inline_order: None,
            pool_threads: None,
            threads: None,
            transport: None,
            linearize: false,
            lock_memory: false,
            select: SelectArgs {
                snapshot: None,
                lower: Vec::new(),
                format: None::<Format>,
                allow_outside: Vec::new(),
            },
        },
        quiet: true,
        image: image.clone(),
        mountpoint: mountpoint.clone(),
    };
    let nofail = match args.serve.settings() {
        Ok(settings) => settings.nofail,
        Err(why) => {
            return Err(Report::usage(
                &format!("cannot mount {}", image.display()),
                why,
            ));
        }
    };
    if nofail && std::fs::metadata(image).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(());
    }
    if request.fake {
        return Ok(());
    }
    mount::run(&args, false)
}

fn run_umount(request: &Request) -> Result<(), Box<Report>> {
    let [target] = request.names.as_slice() else {
        return Err(Report::usage(
            "usage: umount.fuse.ploopfs MOUNTPOINT",
            "one name is needed",
        ));
    };
    umount::unmount(target, request.lazy, None).map_err(|report| {
        Box::new(Report {
            helper_status: exit::MOUNT_FAILED,
            ..*report
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_name_decides() {
        assert_eq!(
            role(&words("/sbin/mount.fuse.ploopfs a b")),
            Some(Role::Mount)
        );
        assert_eq!(role(&words("umount.ploopfs /mnt")), Some(Role::Umount));
        assert_eq!(role(&words("ploopfs mount a b")), None);
        assert_eq!(
            role(&words("ploopfs /a.hdd /mnt -o rw,dev,suid")),
            Some(Role::Mount)
        );
        assert_eq!(role(&words("ploopfs mount ./a -o ro b")), None);
    }

    #[test]
    fn words_of_mount_are_understood_in_any_order() {
        let request = parse(&words("x /a /b -sn -o ro,nofail -rv"), Role::Mount).unwrap();
        assert_eq!(request.names, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(request.options, ["ro,nofail", "ro"]);
        assert!(parse(&words("x /a /b -f"), Role::Mount).unwrap().fake);
        assert!(
            parse(&words("x /b -f -l -v -r -n"), Role::Umount)
                .unwrap()
                .lazy
        );
        assert!(parse(&words("x /a /b -Q"), Role::Mount).is_err());
        assert!(parse(&words("x /a /b -o"), Role::Mount).is_err());
    }
}

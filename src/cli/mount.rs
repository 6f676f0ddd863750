//! `ploopfs mount`.
//!
//! Imports: `error`, `fuse`.
//! Never: prints anything on success when nobody sits at a terminal.

use super::args::MountArgs;
use super::output::{Report, note, print};
use super::serve::{Plan, Served, Target, absolute, describe, launch};
use crate::error::Result;
use crate::fuse::attach::TUNED;
use crate::fuse::dead::make_way;
use crate::fuse::mount::{Shape, examine, shell_word};
use crate::fuse::session::{expect_offered, rings_switch};
use std::io::IsTerminal;
use std::path::Path;

/// Runs the command.
pub fn run(args: &MountArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot mount {}", args.image.display());
    let settings = args
        .serve
        .settings()
        .map_err(|why| Report::usage(&what, why))?;
    let plan = plan(args, settings).map_err(|e| Report::refused(&what, &e))?;
    let served = launch(&plan)?;
    if let (Some(served), Target::Mountpoint(mountpoint, shape)) = (&served, &plan.target) {
        if json {
            let text = serde_json::json!({
                "schema_version": 1,
                "image": plan.shown,
                "mountpoint": mountpoint.to_string_lossy(),
                "size": served.size,
                "read_only": served.read_only,
                "partitions": served.partitions,
                "snapshots": served.snapshots,
            });
            print(&format!("{text}\n"));
        } else if !args.quiet && std::io::stdout().is_terminal() {
            // Where the kernel reads by itself no other way makes a difference.
            let switch = rings_switch().filter(|_| !plan.settings.linearize);
            print(&hints(&plan.shown, mountpoint, (*shape, switch), served));
        }
    }
    Ok(())
}

fn plan(args: &MountArgs, mut settings: super::options::Settings) -> Result<Plan> {
    expect_offered(settings.transport)?;
    settings.expect_linear()?;
    for device in make_way(&args.mountpoint, settings.replace_dead)? {
        note(&orphaned(&device, &args.mountpoint));
    }
    let (mountpoint, shape) = examine(&args.mountpoint, &settings.mount)?;
    absolute_selection(&mut settings)?;
    let pid_file = args.serve.pid_file.as_deref().map(absolute).transpose()?;
    Ok(Plan {
        shown: args.image.display().to_string(),
        image: absolute(&args.image)?,
        target: Target::Mountpoint(mountpoint, shape),
        settings,
        pid_file,
        foreground: args.serve.foreground || args.serve.debug,
        debug: args.serve.debug,
    })
}

/// What is to be done about a loop device over the disk of a mount that was dead.
pub fn orphaned(device: &Path, mountpoint: &Path) -> String {
    let (device, place) = (device.display(), shell_word(mountpoint));
    format!(
        "{device} still has the disk of the dead mount at {place}, and fails: \
         umount what lies on it, then: losetup -d {device}"
    )
}

/// Makes the paths of the selection absolute.
pub fn absolute_selection(settings: &mut super::options::Settings) -> Result<()> {
    let selection = &mut settings.selection;
    for path in selection
        .lower
        .iter_mut()
        .chain(&mut selection.allow_outside)
    {
        *path = absolute(path)?;
    }
    Ok(())
}

/// What a person may want to do next.
fn hints(
    shown: &str,
    mountpoint: &Path,
    (shape, switch): (Shape, Option<&str>),
    served: &Served,
) -> String {
    let place = shell_word(mountpoint);
    let file = match shape {
        Shape::Directory => shell_word(&mountpoint.join("disk.img")),
        Shape::File => place.clone(),
    };
    let root = nix::unistd::geteuid().is_root();
    let read_only = if served.read_only { "-r " } else { "" };
    let mut text = format!("{shown} mounted at {place} ({})\n", describe(served));
    if root {
        text += &format!("  loop device  : losetup -f --show {read_only}--direct-io=on {file}\n");
        text += &faster(switch);
    } else {
        // Root itself cannot look into a user's mount, so `sudo losetup` would be refused.
        text += &format!("  loop device  : udisksctl loop-setup {read_only}-f {file}\n");
    }
    if let (true, Shape::Directory, Some(number)) = (root, shape, served.partitions.first()) {
        let part = shell_word(&mountpoint.join(format!("part{number}.img")));
        text += &format!("  one partition: mount -o loop,ro {part} /mnt\n");
    }
    text + &format!("  unmount      : ploopfs umount {place}\n")
}

/// What makes a loop device, and all the rest, faster. `attach` does the first by itself.
fn faster(switch: Option<&str>) -> String {
    let set = |(file, value)| format!("echo {value} > /sys/block/loopN/queue/{file}");
    let set: Vec<String> = TUNED.map(set).into();
    let mut text = format!("  its speed    : {}\n", set.join("; "));
    if let Some(switch) = switch {
        text += &format!("  faster yet   : echo Y > {switch}, then mount again\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_can_be_pasted() {
        let served = Served {
            size: 64 << 30,
            read_only: true,
            partitions: vec![1, 2],
            ..Served::default()
        };
        let looks = (Shape::Directory, None);
        let text = hints("a.hdd", Path::new("/mnt/a b"), looks, &served);
        assert!(
            text.starts_with("a.hdd mounted at '/mnt/a b' (64 GiB, read-only, 2 partitions)\n")
        );
        assert!(text.contains("-r ") && text.contains("'/mnt/a b/disk.img'"));
        assert!(text.ends_with("ploopfs umount '/mnt/a b'\n"));
    }

    #[test]
    fn what_is_slow_by_default_is_told() {
        let text = faster(None);
        assert!(text.contains("echo 1024 > /sys/block/loopN/queue/read_ahead_kb; echo 1024 > "));
        assert!(text.contains("max_sectors_kb\n") && !text.contains("uring"));
        assert!(faster(Some("/sys/x")).contains("echo Y > /sys/x"));
    }
}

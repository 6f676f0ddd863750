//! Words in, words out, exit codes.
//!
//! Imports: every room below.
//! Never: decides anything about a disk.
//!
//! [`main`] looks at the name that the program was called by: mount(8)'s helpers are the same
//! program ([`helper`]), and so is what a daemon has done beside it (`cli/outside.rs`). Else clap
//! reads the command line ([`args`]), the verb's file runs it, and an error becomes the four lines
//! that [`output`] knows and a status by [`exit`].

pub mod args;
pub mod attach;
pub mod check;
pub mod checksum;
mod child;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod create;
pub mod exit;
mod filesystem;
pub mod helper;
pub mod list;
pub mod map;
pub mod measure;
pub mod merge;
pub mod mount;
pub mod options;
pub mod output;
mod outside;
pub mod progress;
pub mod repair;
pub mod resize;
pub mod serve;
pub mod size;
pub mod snapshot;
pub mod source;
mod trim;
pub mod umount;

use crate::admin;
use crate::admin::info::Tables;
use args::{Cli, InfoArgs, Verb};
use clap::error::ErrorKind as ClapKind;
use clap::{CommandFactory, Parser};
use output::{Report, print};
use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the program with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // What the caller has open is not for the programs that we start.
    let _ = crate::sys::process::hide_strays();
    if outside::is_meant(&args) {
        return ExitCode::from(outside::run());
    }
    if let Some(role) = helper::role(&args) {
        return ExitCode::from(helper::run(role, &args));
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(e) => return ExitCode::from(usage(&e, &args)),
    };
    progress::choose(cli.progress);
    let result = run(&cli);
    if let Err(report) = &result {
        report.print(cli.json);
    }
    let refused = serve::exit_status(&result.as_ref().map(|_| ()).map_err(Clone::clone));
    ExitCode::from(result.unwrap_or(refused))
}

/// Shows help or what was wrong with the command line. clap's own status for wrong usage means
/// "corrupt" elsewhere in this program, so it is not used.
fn usage(error: &clap::Error, args: &[OsString]) -> u8 {
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            print(&error.render().to_string());
            return 0;
        }
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
        }
        _ if args.iter().any(|word| word == "--json") => {
            let text = error.render().to_string();
            let said = text.trim_start_matches("error: ").lines();
            // What is missing is listed on lines of its own.
            let why: Vec<&str> = said
                .take_while(|line| !line.is_empty())
                .map(str::trim)
                .collect();
            Report::usage("cannot understand the command", why.join(" ")).print(true);
        }
        _ => {
            let _ = error.print();
        }
    }
    let judges = ["compare", "checksum"];
    match verb(args) {
        Some(verb) if judges.iter().any(|judge| verb == judge) => exit::TROUBLE,
        _ => exit::FAILED,
    }
}

/// The verb of a command line that clap does not understand: what comes before it are options for
/// all verbs, of which one has a value.
fn verb(args: &[OsString]) -> Option<&OsString> {
    let mut words = args.iter().skip(1);
    loop {
        match words.next()? {
            word if word == "--progress" => drop(words.next()),
            word if word.as_encoded_bytes().starts_with(b"-") => {}
            word => return Some(word),
        }
    }
}

/// The status of a command that was carried out; those that judge a disk have others than 0.
fn run(cli: &Cli) -> Result<u8, Box<Report>> {
    match &cli.verb {
        Verb::Check(args) => return check::run(args, cli.json),
        Verb::Repair(args) => return repair::run(args, cli.json),
        Verb::Resize(args) => resize::run(args, cli.json),
        Verb::Compact(args) => compact::run(args, cli.json),
        Verb::Create(args) => create::run(args, cli.json),
        Verb::Convert(args) => convert::run(args, cli.json),
        Verb::Copy(args) => copy::run(args, cli.json),
        Verb::Compare(args) => return compare::run(args, cli.json),
        Verb::Checksum(args) => return checksum::run(args, cli.json),
        Verb::Map(args) => map::run(args, cli.json),
        Verb::Measure(args) => measure::run(args, cli.json),
        Verb::Mount(args) => mount::run(args, cli.json),
        Verb::Umount(args) => umount::run(args),
        Verb::Attach(args) => attach::attach(args, cli.json),
        Verb::Detach(args) => attach::detach(args),
        Verb::List => list::run(cli.json),
        Verb::Snapshot(args) => snapshot::run(args, cli.json),
        Verb::Merge(args) => merge::run(args, cli.json),
        Verb::Info(args) => info(args, cli.json),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "ploopfs", &mut text);
            print(&String::from_utf8_lossy(&text));
            Ok(())
        }
    }?;
    Ok(0)
}

fn info(args: &InfoArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot examine {}", args.image.display());
    let mut settings = options::Settings::default();
    args.select.apply(&mut settings);
    settings.selection.write = false;
    settings.selection.no_lock = true;
    let info = admin::info::info(&args.image, &settings.selection, Tables::Count)
        .map_err(|e| Report::refused(&what, &e))?;
    if json {
        let text = serde_json::to_string_pretty(&info)
            .map_err(|e| Report::new(&what, &std::io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else {
        print(&admin::info::render(&info));
    }
    Ok(())
}

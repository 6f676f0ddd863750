//! The manual pages agree with the program's help, its completions, and the format's constants.

use crate::{assert_none, files_below, read};
use std::collections::BTreeSet;
use std::process::Command;

type Names = BTreeSet<String>;

fn names(list: &[&str]) -> Names {
    list.iter().map(ToString::to_string).collect()
}

/// What the program prints for these arguments.
fn output(arguments: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.status.success() && !text.is_empty(),
        "{arguments:?}: {:?} {text}",
        out.status
    );
    text
}

/// Long options in plain text: `--name` at the start of a word.
fn long_options(text: &str) -> Names {
    let mut found = Names::new();
    for (at, _) in text.match_indices("--") {
        let before = text[..at].chars().next_back();
        let name: String = text[at + 2..]
            .chars()
            .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')
            .collect();
        let starts = before.is_none_or(|c| c.is_whitespace() || "[(<|'\"`=,".contains(c));
        if starts && name.starts_with(|c: char| c.is_ascii_lowercase()) {
            found.insert(name.trim_end_matches('-').to_owned());
        }
    }
    found
}

/// Long options that an mdoc page marks as its own: `Fl -name`.
fn page_options(page: &str) -> Names {
    let mut found = Names::new();
    for line in page.lines().filter(|line| line.starts_with('.')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            if pair[0].trim_start_matches('.') != "Fl" {
                continue;
            }
            if let Some(name) = pair[1].strip_prefix('-') {
                let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                found.insert(name[..end.unwrap_or(name.len())].to_owned());
            }
        }
    }
    found
}

/// Subcommands that a help text lists.
fn commands(help: &str) -> Names {
    let listed = help
        .lines()
        .skip_while(|line| line.trim() != "Commands:")
        .skip(1);
    listed
        .take_while(|line| line.is_empty() || line.starts_with(' '))
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect()
}

/// Long options that a help text defines; its examples may hold those of other programs.
fn help_options(help: &str) -> Names {
    let lines = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'));
    lines
        .flat_map(|line| long_options(line.split("  ").next().unwrap_or_default()))
        .collect()
}

/// The help of a command, and of the commands within it.
fn whole_help(command: &str) -> String {
    let own = output(&[command, "--help"]);
    let within = commands(&own).into_iter().filter(|name| name != "help");
    let all = within.map(|name| output(&[command, &name, "--help"]));
    std::iter::once(own.clone()).chain(all).collect()
}

/// Options that every command has: the overview page explains them.
const COMMON: [&str; 4] = ["help", "json", "progress", "version"];

fn drift(command: &str, help: &str, page: &str) -> Vec<String> {
    let common = names(&COMMON);
    let ignored = if command == "ploopfs" {
        Names::new()
    } else {
        common
    };
    let offered: Names = help_options(help).difference(&ignored).cloned().collect();
    let described: Names = page_options(page).difference(&ignored).cloned().collect();
    let mut complaints = Vec::new();
    for option in offered.difference(&described) {
        complaints.push(format!(
            "{command}: --{option} is in the help, not in the manual page"
        ));
    }
    for option in described.difference(&offered) {
        complaints.push(format!(
            "{command}: --{option} is in the manual page, not in the help"
        ));
    }
    complaints
}

/// The page that describes a command: the small ones are on the overview.
fn page_of(command: &str) -> Option<String> {
    match command {
        "help" | "completions" => None,
        _ => Some(format!("man/ploopfs-{command}.1")),
    }
}

#[test]
fn manual_pages_and_help_name_the_same_options() {
    let listed = commands(&output(&["--help"]));
    assert!(
        listed.contains("mount") && listed.contains("info"),
        "{listed:?}"
    );
    let overview = read("man/ploopfs.1");
    let mut complaints = drift("ploopfs", &output(&["--help"]), &overview);
    for command in &listed {
        if !overview.contains(&format!("Cm {command}")) && command != "help" {
            complaints.push(format!("ploopfs.1 does not name the command {command}"));
        }
        if let Some(page) = page_of(command) {
            complaints.extend(drift(command, &whole_help(command), &read(&page)));
        }
    }
    for page in files_below("man", |name| name.ends_with(".1")) {
        let command = page
            .name
            .trim_start_matches("man/ploopfs")
            .trim_end_matches(".1");
        let command = command.trim_start_matches('-');
        if !command.is_empty() && !listed.contains(command) {
            complaints.push(format!("{}: there is no such command", page.name));
        }
    }
    assert_none(&complaints);
}

#[test]
fn drift_is_found_in_both_directions() {
    let help = "Usage: x\n  -r, --read-only  Reads (see --help).\n      --pid-file <F>  a--b\n";
    let page = ".It Fl r , Fl -read-only\n.It Fl -lower Ar FILE\nplain text Fl -nothing\n";
    assert_eq!(
        long_options(help),
        names(&["help", "pid-file", "read-only"])
    );
    assert_eq!(page_options(page), names(&["lower", "read-only"]));
    assert_eq!(drift("x", help, page).len(), 2);
    let help =
        "Usage\n\nCommands:\n  mount   Mounts\n          more\n  list    Lists\n\nOptions:\n  -h\n";
    assert_eq!(commands(help), names(&["list", "mount"]));
}

#[test]
fn completions_know_every_command_and_option() {
    let script = output(&["completions", "bash"]);
    let known = long_options(&script);
    let listed = commands(&output(&["--help"]));
    for command in listed.iter().filter(|command| *command != "help") {
        assert!(
            script.contains(command.as_str()),
            "completions lack {command}"
        );
        let missing: Vec<String> = help_options(&output(&[command, "--help"]))
            .difference(&known)
            .cloned()
            .collect();
        assert!(
            missing.is_empty(),
            "{command}: completions lack {missing:?}"
        );
    }
}

/// Commands of this program in prose and examples, as (command, options); `$` and `sudo` may
/// precede.
fn examples(text: &str) -> Vec<(String, Names)> {
    let mut found = Vec::new();
    for line in text.lines() {
        for (at, _) in line.match_indices("ploopfs ") {
            let before = line[..at].trim_end();
            let starts = before.is_empty()
                || ["$", "#", "sudo", "&&", "timeout 5", "`"]
                    .iter()
                    .any(|end| before.ends_with(end));
            let mut words = line[at..].split_whitespace().skip(1);
            let command = words.next().unwrap_or_default();
            let plain = !command.is_empty() && command.chars().all(|c| c.is_ascii_lowercase());
            if starts && plain {
                // What follows a pipe or a list operator is another program's.
                let own = line[at..]
                    .split(['|', ';', '&', '#'])
                    .next()
                    .unwrap_or_default();
                found.push((command.to_owned(), long_options(own)));
            }
        }
    }
    found
}

/// What a page shows as typed: displays of mdoc, fenced code of Markdown.
fn shown(name: &str, text: &str) -> String {
    let mut fenced = false;
    let lines = text.lines().filter(|line| {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        if name.ends_with(".md") {
            fenced
        } else {
            !line.starts_with('.')
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn examples_use_commands_and_options_that_exist() {
    let mut listed = commands(&output(&["--help"]));
    // Works, but is for packages rather than for people, so the help does not list it.
    listed.insert("completions".to_owned());
    let mut pages = files_below("man", |name| !name.ends_with(".5"));
    let readme = crate::TextFile {
        name: "README.md".to_owned(),
        text: read("README.md"),
    };
    pages.push(readme);
    let mut complaints = Vec::new();
    let mut seen = 0;
    for page in pages {
        for (command, options) in examples(&shown(&page.name, &page.text)) {
            seen += 1;
            if !listed.contains(&command) {
                complaints.push(format!("{}: no command {command}", page.name));
                continue;
            }
            for option in options.difference(&help_options(&whole_help(&command))) {
                complaints.push(format!("{}: {command} has no --{option}", page.name));
            }
        }
    }
    assert!(seen > 10, "only {seen} examples were found");
    assert_none(&complaints);
}

#[test]
fn examples_are_found() {
    let text =
        "$ ploopfs mount --lower a b\nsudo ploopfs umount x && ls --all\nThe ploopfs program\n";
    let found = examples(text);
    assert_eq!(
        shown("a.md", "ploopfs a\n```\nploopfs b\n```\n"),
        "```\nploopfs b"
    );
    assert_eq!(shown("a.1", ".Nm\nploopfs a\n"), "ploopfs a");
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], ("mount".to_owned(), names(&["lower"])));
    assert_eq!(found[1], ("umount".to_owned(), Names::new()));
}

/// A row of the header's table: offset, size, name as the format spells it.
type Field = (usize, usize, String);

/// Rows `.It 16 Ta 4 Ta Va m_Type Ta ...` of the page.
fn page_fields(page: &str) -> Vec<Field> {
    let rows = page.lines().filter_map(|line| line.strip_prefix(".It "));
    rows.filter_map(|row| {
        let mut cells = row.split(" Ta ").map(str::trim);
        let offset = cells.next()?.parse().ok()?;
        let size = cells.next()?.parse().ok()?;
        let name = cells.next()?.strip_prefix("Va ")?;
        name.starts_with("m_")
            .then(|| (offset, size, name.to_owned()))
    })
    .collect()
}

/// `m_SizeInSectors` is `M_SIZE_IN_SECTORS` in the sources.
fn constant_name(field: &str) -> String {
    let mut name = String::new();
    for c in field.chars() {
        if c.is_uppercase() && !name.ends_with('_') {
            name.push('_');
        }
        name.extend(c.to_uppercase());
    }
    name
}

/// `pub const NAME: type = number;` with decimal or hexadecimal numbers.
fn constants(source: &str) -> Vec<(String, u64)> {
    let declared = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub const "));
    declared
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let value = rest
                .split_once("= ")?
                .1
                .trim_end_matches(';')
                .replace('_', "");
            let value = match value.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16).ok()?,
                None => value.parse().ok()?,
            };
            Some((name.to_owned(), value))
        })
        .collect()
}

fn field_complaints(page: &str, header: &str) -> Vec<String> {
    let fields = page_fields(page);
    let known = constants(header);
    let mut complaints = Vec::new();
    let mut next = 0;
    for (offset, size, name) in &fields {
        if *offset != next {
            complaints.push(format!(
                "{name}: at {offset} in the page, {next} follows from above"
            ));
        }
        next = offset + size;
        let constant = known
            .iter()
            .find(|(found, _)| *found == constant_name(name));
        if constant.map(|(_, value)| *value) != u64::try_from(*offset).ok() {
            complaints.push(format!(
                "{name}: at {offset} in the page, {constant:?} in the source"
            ));
        }
    }
    let header_len = known
        .iter()
        .find(|(name, _)| name == "HEADER_LEN")
        .map(|(_, value)| *value);
    if header_len != u64::try_from(next).ok() {
        complaints.push(format!(
            "the page's fields end at {next}, the header at {header_len:?}"
        ));
    }
    for (name, _) in known.iter().filter(|(name, _)| name.starts_with("M_")) {
        if !fields
            .iter()
            .any(|(_, _, field)| constant_name(field) == *name)
        {
            complaints.push(format!("{name} is not in the page"));
        }
    }
    complaints
}

#[test]
fn the_format_page_and_the_parser_agree() {
    let (page, header) = (read("man/ploopfs-image.5"), read("src/format/header.rs"));
    assert_none(&field_complaints(&page, &header));
    for name in ["IN_USE", "CLOSED_V21"] {
        let known = constants(&header);
        let value = known.iter().find(|(found, _)| found == name).unwrap().1;
        assert!(
            page.to_lowercase().contains(&format!("0x{value:08x}")),
            "{name} is not there"
        );
    }
    let extension = constants(&read("src/format/extension.rs"));
    for name in ["MAGIC", "BITMAP_MAGIC"] {
        let value = extension.iter().find(|(found, _)| found == name).unwrap().1;
        assert!(
            page.to_lowercase().contains(&format!("0x{value:016x}")),
            "{name} is not there"
        );
    }
    for magic in ["WithoutFreeSpace", "WithouFreSpacExt"] {
        assert!(page.contains(magic) && header.contains(magic));
    }
}

#[test]
fn a_wrong_offset_is_found() {
    let header = "pub const HEADER_LEN: usize = 24;\npub const M_SIG: usize = 0;\n\
                  pub const M_DISK_TYPE: usize = 16;\npub const M_FLAGS: usize = 0x14;\n";
    let row = |offset: usize, name: &str, size: usize| {
        format!(".It {offset} Ta {size} Ta Va {name} Ta x\n")
    };
    let good = row(0, "m_Sig", 16) + &row(16, "m_DiskType", 4) + &row(20, "m_Flags", 4);
    assert_none(&field_complaints(&good, header));
    let moved = row(0, "m_Sig", 16) + &row(17, "m_DiskType", 3) + &row(20, "m_Flags", 4);
    assert_eq!(field_complaints(&moved, header).len(), 2);
    let short = row(0, "m_Sig", 16) + &row(16, "m_DiskType", 4);
    assert_eq!(field_complaints(&short, header).len(), 2);
}

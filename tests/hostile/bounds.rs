//! Numbers in files buy no memory, and no more time than the bytes that they stand in.

use crate::answer::{expect_error, open, refused, room, selection};
use crate::descriptors::{OTHER, broken, chain, edit};
use crate::forge::bundle::NONE;
use crate::forge::image::{ImageSpec, V21};
use crate::heap::{cpu_ns, peak_of};
use crate::support::Outcome;
use crate::support::guards::Mounted;
use crate::support::harness::{skip_excused, trial};
use crate::support::probe::Need::Fuse;
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use ploopfs::error::ErrorKind::{Corrupt, Descriptor as BadDescriptor, Unsupported};
use ploopfs::format::descriptor::Descriptor;
use ploopfs::format::names;
use ploopfs::units::DiskOffset;
use std::fmt::Write;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("large_tables_take_little_memory", &[], large_tables),
        trial("large_clusters_take_little_memory", &[], large_clusters),
        trial(
            "large_plain_images_take_little_memory",
            &[],
            large_plain_images,
        ),
        trial(
            "clusters_behind_the_table_are_bounded",
            &[],
            clusters_behind_the_table,
        ),
        trial("deep_chains_take_little_memory", &[], deep_chains),
        trial("many_parts_take_little_memory", &[], many_parts),
        trial("descriptors_are_bounded", &[], descriptors_are_bounded),
        trial(
            "descriptors_take_linear_time",
            &[],
            descriptors_take_linear_time,
        ),
        trial("names_take_linear_time", &[], names_take_linear_time),
        trial(
            "snapshots_looked_at_are_let_go",
            &[Fuse],
            snapshots_looked_at_are_let_go,
        ),
        trial("what_people_are_told_is_bounded", &[], what_people_are_told),
    ]
}

/// What any image may take beyond what a small one takes.
const MEMORY_MAX: i64 = 64 << 20;

/// Opens, reads here and there and closes; the most memory that it took beyond a small image.
fn memory(path: &Path, write: bool) -> Result<i64> {
    let (result, peak) = peak_of(|| use_it(path, write));
    result.with_context(|| format!("{}, write: {write}", path.display()))?;
    let dir = room()?;
    let small = dir.path().join("small.hds");
    ImageSpec::new(2, 64, 640).write(&small)?;
    let (result, base) = peak_of(|| use_it(&small, write));
    result?;
    Ok(peak - base)
}

fn use_it(path: &Path, write: bool) -> Outcome {
    let (disk, _) = open(path, &selection(write))?;
    let size = disk.size_bytes();
    let mut bytes = [0; 4096];
    for part in 0..64 {
        let at = (size / 64 * part).min(size.saturating_sub(4096));
        // What is wrong with an image is told elsewhere.
        let _ = disk.read_at(DiskOffset::new(at & !511), &mut bytes);
    }
    Ok(disk.close()?)
}

fn expect_little(path: &Path, write: bool) -> Outcome {
    let taken = memory(path, write)?;
    ensure!(
        taken <= MEMORY_MAX,
        "{}: {taken} bytes, write: {write}",
        path.display()
    );
    Ok(())
}

fn large_tables() -> Outcome {
    let dir = room()?;
    // The most entries that there may be, in the smallest and in usual clusters, in sparse files.
    for (version, cluster) in [(2, 8), (2, 2048), (1, 8), (1, 128)] {
        let path = dir.path().join(format!("{version}-{cluster}.hds"));
        let sectors = ((1 << 29) - 1) * u64::from(cluster);
        let sectors = if version == 1 {
            sectors.min(u64::from(u32::MAX))
        } else {
            sectors
        };
        ImageSpec::new(version, cluster, sectors).write(&path)?;
        for write in [false, true] {
            expect_little(&path, write)?;
        }
        fs::remove_file(&path)?;
    }
    // The same numbers in a file that is too short for them.
    let path = dir.path().join("short.hds");
    ImageSpec::new(2, 8, 6400).write(&path)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    for entries in [(1_u32 << 29) - 1, 1 << 29, u32::MAX] {
        file.write_all_at(&entries.to_le_bytes(), 32)?;
        for write in [false, true] {
            let (opened, peak) = peak_of(|| open(&path, &selection(write)).map(drop));
            ensure!(opened.is_err(), "{entries} entries in a short file");
            // The buffers of any disk, which are there before it is looked at.
            ensure!(peak < 32 << 20, "{peak} bytes for a refusal");
        }
    }
    Ok(())
}

fn large_clusters() -> Outcome {
    let dir = room()?;
    for (cluster, write) in [(131_072, false), (131_072, true), (4_186_127, false)] {
        let path = dir.path().join(format!("{cluster}-{write}.hds"));
        let mut spec = ImageSpec::new(2, cluster, u64::from(cluster) * 8);
        spec.tail = 4;
        spec.mark = V21;
        spec.write(&path)?;
        // An extension in a cluster of zeros: to see that it is none, as little as possible.
        let file = OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&(u64::from(cluster) * 2).to_le_bytes(), 56)?;
        let taken = memory(&path, write)?;
        let cluster = i64::from(cluster) * 512;
        let allowed = MEMORY_MAX + if cluster <= MEMORY_MAX { cluster } else { 0 };
        ensure!(taken <= allowed, "{}: {taken} bytes", path.display());
    }
    Ok(())
}

fn large_plain_images() -> Outcome {
    let dir = crate::support::scratch_tmpfs()?;
    let path = dir.path().join("d.hdd");
    chain(1).write(&path)?;
    let file = path.join(chain(1).file_name("d.hdd", 0, 0));
    edit(&path, |xml| xml.replacen("Compressed", "Plain", 1))?;
    for len in [1_u64 << 42, (1 << 62) + 12_345, i64::MAX as u64] {
        fs::write(&file, b"plain")?;
        OpenOptions::new().write(true).open(&file)?.set_len(len)?;
        for write in [false, true] {
            let (opened, peak) = peak_of(|| open(&path, &selection(write)));
            if let Ok((disk, _)) = opened {
                ensure!(
                    disk.size_bytes() == 6403 * 512,
                    "{} bytes",
                    disk.size_bytes()
                );
                disk.close()?;
            }
            ensure!(peak < MEMORY_MAX, "{peak} bytes for {len}");
            let found = fs::metadata(&file)?.len();
            ensure!(found == len, "{len} became {found}");
        }
    }
    Ok(())
}

/// Entries that no table of this size needs are kept one by one, so there is an end to them.
fn clusters_behind_the_table() -> Outcome {
    let dir = room()?;
    let path = dir.path().join("a.hds");
    let entries = 1_200_000_u32;
    let spec = ImageSpec::new(2, 8, u64::from(entries) * 8);
    spec.write(&path)?;
    let first = u32::try_from(spec.data_start() / 8)? + entries;
    let file = OpenOptions::new().write(true).open(&path)?;
    let table: Vec<u8> = (first..first + entries)
        .flat_map(u32::to_le_bytes)
        .collect();
    file.write_all_at(&table, 64)?;
    file.set_len(u64::from(first + entries) * 4096)?;
    let (opened, peak) = peak_of(|| open(&path, &selection(true)).map(drop));
    let error = opened.err().context("was opened")?;
    expect_error(
        &error,
        Unsupported,
        &["more than 1048576 entries", "mount -r"],
    )?;
    ensure!(peak < MEMORY_MAX, "{peak} bytes");
    expect_little(&path, false)?;
    // A few of them are what another program leaves when it makes a disk smaller.
    file.write_all_at(&vec![0; table.len() - 4000], 64 + 4000)?;
    let (disk, _) = open(&path, &selection(true))?;
    disk.close()?;
    file.write_all_at(&first.to_le_bytes(), 64 + 4)?;
    refused(
        &path,
        true,
        Corrupt,
        &["that another one has too", "repair"],
    )
}

/// Makes images of 4 KiB clusters without data, with a descriptor; returns how many may be open.
fn many_files(dir: &Path, count: usize, sectors: u64) -> Result<PathBuf> {
    let most = ploopfs::sys::open::raise_file_limit()?;
    if most < count as u64 + 64 {
        return Err(skip_excused(format!("only {most} files may be open")));
    }
    let path = dir.join(format!("{count}-{sectors}.hdd"));
    fs::create_dir(&path)?;
    for number in 0..count {
        ImageSpec::new(2, 8, sectors).write(&path.join(format!("{number}.hds")))?;
    }
    Ok(path)
}

fn guid(number: usize) -> String {
    format!("{{{number:08x}-0000-4000-8000-000000000000}}")
}

fn image_node(guid: &str, file: usize) -> String {
    format!("<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>{file}.hds</File></Image>\n")
}

fn shot_node(number: usize) -> String {
    let parent = number.checked_sub(1).map_or(NONE.to_owned(), guid);
    format!(
        "<Shot><GUID>{}</GUID><ParentGUID>{parent}</ParentGUID></Shot>\n",
        guid(number)
    )
}

fn document(size: u64, storages: &str, shots: &str, top: &str) -> String {
    format!(
        "<Parallels_disk_image><Disk_Parameters><Disk_size>{size}</Disk_size></Disk_Parameters>\n\
         <StorageData>{storages}</StorageData>\n\
         <Snapshots><TopGUID>{top}</TopGUID>{shots}</Snapshots></Parallels_disk_image>"
    )
}

fn storage(start: u64, end: u64, images: &str) -> String {
    let bounds = format!("<Start>{start}</Start><End>{end}</End>");
    format!("<Storage>{bounds}<Blocksize>8</Blocksize>{images}</Storage>\n")
}

/// A chain of so many images, top last.
fn chain_document(count: usize) -> String {
    let images: String = (0..count).map(|n| image_node(&guid(n), n)).collect();
    let shots: String = (0..count).map(shot_node).collect();
    document(640, &storage(0, 640, &images), &shots, &guid(count - 1))
}

fn deep_chains() -> Outcome {
    let dir = room()?;
    for count in [253, 4096] {
        let path = many_files(dir.path(), count, 640)?;
        fs::write(path.join("DiskDescriptor.xml"), chain_document(count))?;
        for write in [false, true] {
            expect_little(&path, write)?;
        }
    }
    Ok(())
}

fn many_parts() -> Outcome {
    let dir = room()?;
    // Small ones, and ones whose tables are as large together as is allowed, and larger.
    for (count, sectors, fits) in [(4096, 64, true), (4096, 32_000, true), (64, 8 << 24, false)] {
        let path = many_files(dir.path(), count, sectors)?;
        let storages: String = (0..count)
            .map(|n| {
                let start = n as u64 * sectors;
                storage(start, start + sectors, &image_node(&guid(0), n))
            })
            .collect();
        let text = document(count as u64 * sectors, &storages, &shot_node(0), &guid(0));
        fs::write(path.join("DiskDescriptor.xml"), text)?;
        for write in [false, true] {
            if fits {
                let taken = memory(&path, write)?;
                ensure!(
                    taken <= 4 * MEMORY_MAX,
                    "{taken} bytes for {count} of {sectors}"
                );
            } else {
                let (opened, peak) = peak_of(|| open(&path, &selection(write)).map(drop));
                let error = opened.err().context("was opened")?;
                expect_error(&error, Unsupported, &["too large together"])?;
                ensure!(peak < MEMORY_MAX, "{peak} bytes for a refusal");
            }
        }
    }
    Ok(())
}

fn descriptors_are_bounded() -> Outcome {
    ensure!(
        Descriptor::parse(chain_document(4096).as_bytes()).is_ok(),
        "4096 are too many"
    );
    let told = Descriptor::parse(chain_document(4097).as_bytes());
    let told = told.err().context("4097 are not too many")?.to_string();
    ensure!(told == "more than 4096 images", "{told}");
    let shots: String = (0..4097).map(shot_node).collect();
    let images = storage(0, 640, &image_node(&guid(4096), 0));
    let told = Descriptor::parse(document(640, &images, &shots, &guid(4096)).as_bytes());
    let told = told.err().context("4097 are not too many")?.to_string();
    ensure!(told == "more than 4096 snapshots", "{told}");
    // Any document of the greatest size, whatever is in it.
    for (what, text) in hostile_documents(1 << 20) {
        let (_, peak) = peak_of(|| Descriptor::parse(text.as_bytes()).map(drop));
        ensure!(peak < MEMORY_MAX, "{what}: {peak} bytes");
    }
    let dir = room()?;
    let path = broken(dir.path(), &chain(1), &[])?;
    fs::write(path.join("DiskDescriptor.xml"), "x".repeat((1 << 20) + 1))?;
    refused(&path, false, BadDescriptor, &["1048577 bytes are more"])
}

/// Documents of about so many bytes, each with too much of something.
fn hostile_documents(len: usize) -> Vec<(&'static str, String)> {
    let many = |piece: &dyn Fn(usize) -> String| {
        let mut text = String::from("<Parallels_disk_image>");
        let mut number = 0;
        while text.len() + 100 < len {
            text.push_str(&piece(number));
            number += 1;
        }
        text + "</Parallels_disk_image>"
    };
    let attributes = |n: usize| {
        let list: String = (0..60).fold(String::new(), |mut list, a| {
            let _ = write!(list, " a{a}='{n}'");
            list
        });
        format!("<a{list}/>")
    };
    let mut documents = vec![
        ("elements", many(&|_| "<a/>\n".to_owned())),
        ("texts", many(&|_| "x<a/>".to_owned())),
        ("comments", many(&|_| "a<!-- -->".to_owned())),
        ("references", many(&|_| "&#65;&amp;".to_owned())),
        ("sections", many(&|_| "<![CDATA[x]]>".to_owned())),
        ("instructions", many(&|_| "<?x y?>".to_owned())),
        ("attributes", many(&attributes)),
        (
            "long attributes",
            many(&|_| format!("<a b='{}'/>", "&lt;".repeat(200))),
        ),
        ("lines", many(&|_| "\n".to_owned())),
        ("unknown references", many(&|_| "&x;".to_owned())),
        ("open elements", "<a>".repeat(len / 3)),
        (
            "closed wrongly",
            "<a>".repeat(len / 6) + &"</b>".repeat(len / 8),
        ),
        ("a long name", format!("<{}/>", "a".repeat(len - 10))),
        ("prefixes", many(&|n| format!("<p{n}:a/>"))),
        (
            "one attribute",
            format!("<a b='{}'/>", "x".repeat(len - 20)),
        ),
    ];
    let spaces: String = (0..60).map(|n| format!(" xmlns:n{n}='u{n}'")).collect();
    let inside = many(&|_| "<n59:a/>".to_owned());
    documents.push((
        "name spaces",
        inside.replacen("_image>", &format!("_image{spaces}>"), 1),
    ));
    for (what, node) in [
        ("shots", shot_node(7)),
        ("images", image_node(OTHER, 7)),
        ("storages", storage(0, 1, "")),
    ] {
        let text = document(64, &node.repeat(len / 2 / node.len()), "", OTHER);
        documents.push((
            what,
            text.replace("</StorageData>", &format!("{node}</StorageData>")),
        ));
    }
    documents
}

/// The least time of several runs, so that what else the host does counts little.
fn least_ns(mut what: impl FnMut()) -> u64 {
    let mut least = u64::MAX;
    for _ in 0..5 {
        let before = cpu_ns();
        what();
        least = least.min(cpu_ns() - before);
    }
    least
}

/// Four times the input takes four times the time; with steps that grow with the square of it, it
/// would be sixteen times. What else the host does disturbs this, so one good answer is enough.
fn expect_linear(what: &str, mut run: impl FnMut(usize)) -> Outcome {
    let mut ratios = Vec::new();
    for _ in 0..8 {
        let small = least_ns(|| run(1));
        let large = least_ns(|| run(4));
        // Below this the clock measures itself.
        let ratio = large / small.max(50_000);
        if ratio < 10 {
            return Ok(());
        }
        ratios.push(ratio);
    }
    anyhow::bail!("{what}: 4 times the input takes {ratios:?} times the time")
}

fn descriptors_take_linear_time() -> Outcome {
    expect_linear("a chain", |times| {
        let text = chain_document(1024 * times);
        let descriptor = Descriptor::parse(text.as_bytes()).expect("a good document");
        let top = descriptor.chain(descriptor.top).expect("a good chain");
        let images = descriptor.images(0, &top).expect("all images");
        assert_eq!(images.len(), 1024 * times);
        assert_eq!(descriptor.frozen().len(), 1024 * times - 1);
    })?;
    expect_linear("parts", |times| {
        let storages: String = (0..1024 * times as u64)
            .map(|n| storage(n * 8, n * 8 + 8, &image_node(&guid(0), 0)))
            .collect();
        let size = 1024 * 8 * times as u64;
        let text = document(size, &storages, &shot_node(0), &guid(0));
        let found = Descriptor::parse(text.as_bytes()).expect("a good document");
        assert_eq!(found.parts.len(), 1024 * times);
    })?;
    // Refused or not.
    let small = hostile_documents(1 << 18);
    let large = hostile_documents(1 << 20);
    for ((what, small), (_, large)) in small.iter().zip(&large) {
        expect_linear(what, |times| {
            let text = if times == 1 { small } else { large };
            let _ = Descriptor::parse(text.as_bytes());
        })?;
    }
    Ok(())
}

fn names_take_linear_time() -> Outcome {
    expect_linear("names one in another", |times| {
        let open: String = (0..250 * times)
            .map(|n| format!("<SavedStateItem guid='{}'><Name>n</Name>", guid(n)))
            .collect();
        let text = format!("{open}{}", "</SavedStateItem>".repeat(250 * times));
        assert_eq!(
            names::parse(text.as_bytes()).expect("good names").len(),
            250 * times
        );
    })?;
    expect_linear("names beside each other", |times| {
        let items: String = (0..2000 * times)
            .map(|n| {
                format!(
                    "<SavedStateItem guid='{}'><Name>n</Name></SavedStateItem>",
                    guid(n)
                )
            })
            .collect();
        let found = names::parse(format!("<a>{items}</a>").as_bytes()).expect("good names");
        assert_eq!(found.len(), 2000 * times);
    })
}

/// Snapshots each of a file of its own: a look at all of them opens all, one after the other, and
/// keeps few.
fn snapshots_looked_at_are_let_go() -> Outcome {
    const COUNT: usize = 1000;
    let dir = crate::support::scratch()?;
    let path = many_files(dir.path(), COUNT, 640)?;
    let images: String = (0..COUNT).map(|n| image_node(&guid(n), n)).collect();
    // All but the first stand on the first, the top among them.
    let shots: String = (0..COUNT)
        .map(|n| {
            let parent = if n == 0 { NONE.to_owned() } else { guid(0) };
            let own = guid(n);
            format!("<Shot><GUID>{own}</GUID><ParentGUID>{parent}</ParentGUID></Shot>\n")
        })
        .collect();
    let text = document(640, &storage(0, 640, &images), &shots, &guid(COUNT - 1));
    fs::write(path.join("DiskDescriptor.xml"), text)?;
    let mounted = Mounted::new(dir.path(), &path, &["-r"])?;
    let list = format!("/proc/{}/fd", mounted.pid());
    let open = || Ok::<_, anyhow::Error>(fs::read_dir(&list)?.count());
    let disk = |n| {
        mounted
            .path()
            .join(format!("snapshots/{}/disk.img", guid(n)))
    };
    let before = open()?;
    for round in 0..2 {
        for n in 0..COUNT - 1 {
            let len = fs::metadata(disk(n))?.len();
            ensure!(len == 640 * 512, "{len} bytes of {n} in round {round}");
        }
    }
    let after = open()?;
    ensure!(
        after <= before + 40,
        "{before} open files have become {after}"
    );
    // An open file outlives what is let go.
    let file = fs::File::open(disk(1))?;
    for n in 2..100 {
        ensure!(fs::read(disk(n))? == vec![0; 640 * 512], "snapshot {n}");
    }
    let mut bytes = [1; 512];
    file.read_exact_at(&mut bytes, 512)?;
    ensure!(bytes == [0; 512], "an open file changed");
    drop(file);
    ensure!(open()? <= before + 40, "open files pile up");
    mounted.umount()
}

fn what_people_are_told() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(1), &[])?;
    let shots: String = (0..4000).map(shot_node).collect::<String>();
    edit(&path, |xml| {
        let shots = shots.replace("</Shot>", "<Temporary/></Shot>");
        xml.replacen("</Snapshots>", &format!("{shots}</Snapshots>"), 1)
    })?;
    let (disk, notes) = open(&path, &selection(false))?;
    disk.close()?;
    let len: usize = notes.iter().map(String::len).sum();
    ensure!(
        notes.len() < 50 && len < 10_000,
        "{} notes of {len} bytes",
        notes.len()
    );
    ensure!(
        notes.iter().any(|note| note == "and 3980 more of the kind"),
        "{notes:?}"
    );
    Ok(())
}

//! Pagemap images: whatever is accepted has runs that rise, do not overlap and lie inside the address space, and is written
//! back as it was read.

use std::path::Path;

use rewarm_criu::image::pagemap::{self, Entry, Pagemap};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_integration_tests::fuzz::{self, Random};

const PAGE: u64 = 4096;
const ADDRESS_MAX: u64 = 1 << 56;
const MAGICS: [u32; 2] = [0x5456_4319, 0x5608_4025];
const OBJECT: Object = Object::Task { pid: 1 };

/// Entries as they stand in an image: address, old count, flags, count.
type Raw = (u64, u64, Option<u64>, Option<u64>);

fn entries(random: &mut Random) -> Vec<Raw> {
    let mut vaddr = 0x1000;
    let mut entries = Vec::new();
    for _ in 0..random.below(6) {
        let pages = 1 + random.below(4);
        entries.push(match random.below(10) {
            0 => (
                random.one(&[0, vaddr + 1, ADDRESS_MAX, ADDRESS_MAX - PAGE, u64::MAX - 4095]),
                random.below(3),
                Some(random.below(10)),
                Some(random.one(&[0, 1, 2, 1 << 43, 1 << 44, 1 << 52, u64::MAX])),
            ),
            1 => (vaddr.saturating_sub(random.one(&[PAGE, 2 * PAGE])), 0, Some(4), Some(pages)),
            2 => (vaddr, pages, None, None),
            _ => (vaddr, 0, Some(random.one(&[2, 4, 6])), Some(pages)),
        });
        vaddr += (pages + random.below(2)) * PAGE;
    }
    entries
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn record(fields: &[(u64, Option<u64>)]) -> Vec<u8> {
    let mut message = Vec::new();
    for (field, value) in fields {
        if let Some(value) = value {
            varint(&mut message, field << 3);
            varint(&mut message, *value);
        }
    }
    let mut bytes = (message.len() as u32).to_le_bytes().to_vec();
    bytes.extend(message);
    bytes
}

fn image(random: &mut Random, entries: &[Raw]) -> Vec<u8> {
    let mut bytes: Vec<u8> = MAGICS.iter().flat_map(|magic| magic.to_le_bytes()).collect();
    bytes.extend(record(&[(1, Some(random.below(9)))]));
    for (vaddr, old, flags, pages) in entries {
        bytes.extend(record(&[(1, Some(*vaddr)), (2, Some(*old)), (4, *flags), (5, *pages)]));
    }
    random.spoil(&mut bytes);
    bytes
}

/// The rules that pager and restore rely on.
fn sound(entries: &[Entry]) -> Result<(), String> {
    let mut behind = 0;
    for entry in entries {
        let end = entry.pages.checked_mul(PAGE).and_then(|bytes| entry.vaddr.checked_add(bytes));
        let end = end.filter(|end| *end <= ADDRESS_MAX).ok_or_else(|| format!("{entry:?} ends nowhere"))?;
        if entry.pages == 0 || !entry.vaddr.is_multiple_of(PAGE) || entry.vaddr < behind {
            return Err(format!("{entry:?} behind {behind:#x}"));
        }
        behind = end;
    }
    Ok(())
}

fn case(random: &mut Random, directory: &Path) -> Result<(), String> {
    let entries = entries(random);
    let bytes = image(random, &entries);
    std::fs::write(pagemap::path(directory, OBJECT), &bytes).map_err(|error| error.to_string())?;
    let Ok(read) = pagemap::read(directory, OBJECT) else { return Ok(()) };
    sound(&read.entries)?;
    pagemap::write(directory, OBJECT, &read).map_err(|error| format!("what was read is refused: {error}"))?;
    let again =
        pagemap::read(directory, OBJECT).map_err(|error| format!("what was written is refused: {error}"))?;
    if again == read { Ok(()) } else { Err(format!("{read:?} became {again:?}")) }
}

#[test]
fn pagemap_images() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let mut accepted = 0_u64;
    fuzz::holds("pagemap images", |random| {
        case(random, directory.path())?;
        accepted += u64::from(pagemap::read(directory.path(), OBJECT).is_ok());
        Ok(())
    });
    assert!(accepted > 0, "no case was accepted, so nothing was compared");
}

#[test]
fn a_reader_of_pagemaps_that_checks_nothing_is_caught() {
    fuzz::catches("unchecked entries", |random| {
        let unchecked = entries(random).into_iter().map(|(vaddr, old, _, pages)| Entry {
            vaddr,
            pages: pages.unwrap_or(old),
            flags: Flags::PRESENT,
        });
        sound(&Pagemap { pages_id: 1, entries: unchecked.collect() }.entries)
    });
}

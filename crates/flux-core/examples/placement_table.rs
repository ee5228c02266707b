//! Prints the tables of docs/placement.md: how evenly replicas and leaders are placed, and how many move
//! when a node comes or goes, by the code that places them.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use flux_core::Partitions;
use flux_core::placement::{NodeId, Placeable, desired};

const REPLICATION_FACTOR: u8 = 3;

fn main() -> io::Result<()> {
    io::stdout().write_all(tables().as_bytes())
}

fn tables() -> String {
    let mut text = String::from(
        "| partitions | nodes | replicas a node: share | least – most | leads: share | least – most \
         | a node comes: due | moved | a node goes: had | moved |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for partitions in [64, 1024] {
        for nodes in [3, 4, 5, 7, 10, 30, 100, 300, 1000] {
            text.push_str(&one_zone(partitions, nodes));
        }
    }
    text.push_str(
        "\nZones of different sizes, 1,024 partitions:\n\n\
         | nodes of each zone | replicas of each zone | of each of its nodes |\n|---|---|---|\n",
    );
    let zones: [&[usize]; 6] =
        [&[1, 1, 1], &[4, 4, 4], &[5, 4, 4], &[10, 10, 2], &[5, 5], &[6, 5, 4, 3, 2]];
    for sizes in zones {
        text.push_str(&many_zones(sizes));
    }
    text
}

fn one_zone(count: u16, size: usize) -> String {
    let partitions = Partitions::new(count).expect("a power of two");
    let nodes = nodes(&[size + 1]);
    let (newcomer, nodes) = (nodes.last(), &nodes[..size]);
    let layout = desired(nodes, partitions, REPLICATION_FACTOR, None);
    let grown: Vec<Placeable> = nodes.iter().chain(newcomer).cloned().collect();
    let after_coming = desired(&grown, partitions, REPLICATION_FACTOR, Some(&layout));
    let held = held(nodes, &layout);
    let leads =
        count_each(nodes, |node| layout.iter().filter(|list| list.first() == Some(&node)).count());
    // The one that holds most goes.
    let fullest = (0..size).max_by_key(|&place| held[place]).unwrap_or_default();
    let left: Vec<Placeable> =
        nodes.iter().filter(|place| place.node != nodes[fullest].node).cloned().collect();
    let after_going = desired(&left, partitions, REPLICATION_FACTOR, Some(&layout));
    let replicas = f64::from(count) * f64::from(REPLICATION_FACTOR);
    format!(
        "| {} | {} | {:.1} | {} | {:.1} | {} | {:.1} | {} | {} | {} |\n",
        with_comma(count.into()),
        with_comma(size),
        replicas / size as f64,
        range(&held),
        f64::from(count) / size as f64,
        range(&leads),
        replicas / (size + 1) as f64,
        moved(&layout, &after_coming),
        held[fullest],
        moved(&layout, &after_going),
    )
}

fn many_zones(sizes: &[usize]) -> String {
    let nodes = nodes(sizes);
    let partitions = Partitions::new(1024).expect("a power of two");
    let layout = desired(&nodes, partitions, REPLICATION_FACTOR, None);
    let held = held(&nodes, &layout);
    let (mut names, mut totals, mut ranges) = (String::new(), String::new(), String::new());
    let mut rest = held.as_slice();
    for (zone, &size) in sizes.iter().enumerate() {
        let (of_zone, others) = rest.split_at(size);
        rest = others;
        let comma = if zone == 0 { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(names, "{comma}{size}");
        let _ = write!(totals, "{comma}{}", of_zone.iter().sum::<usize>());
        let _ = write!(ranges, "{comma}{}", range(of_zone));
    }
    format!("| {names} | {totals} | {ranges} |\n")
}

/// Nodes with ids scattered as random ones are.
fn nodes(sizes: &[usize]) -> Vec<Placeable> {
    let zones =
        sizes.iter().enumerate().flat_map(|(zone, &size)| vec![format!("zone-{zone}"); size]);
    let place = |(zone, number): (String, u32)| Placeable {
        node: NodeId(number.wrapping_mul(0x9e37_79b1)),
        zone,
    };
    zones.zip(1..).map(place).collect()
}

fn count_each(nodes: &[Placeable], count: impl Fn(NodeId) -> usize) -> Vec<usize> {
    nodes.iter().map(|place| count(place.node)).collect()
}

fn held(nodes: &[Placeable], layout: &[Vec<NodeId>]) -> Vec<usize> {
    count_each(nodes, |node| layout.iter().filter(|list| list.contains(&node)).count())
}

/// Replicas that are new where they are.
fn moved(before: &[Vec<NodeId>], after: &[Vec<NodeId>]) -> usize {
    let new = |(before, after): (&Vec<NodeId>, &Vec<NodeId>)| {
        after.iter().filter(|node| !before.contains(node)).count()
    };
    before.iter().zip(after).map(new).sum()
}

fn range(counts: &[usize]) -> String {
    let (least, most) = (counts.iter().min(), counts.iter().max());
    let (least, most) = (least.copied().unwrap_or_default(), most.copied().unwrap_or_default());
    if least == most { format!("{least}") } else { format!("{least} – {most}") }
}

fn with_comma(number: usize) -> String {
    if number < 1000 {
        format!("{number}")
    } else {
        format!("{},{:03}", number / 1000, number % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document holds the tables between two markers. When this fails, put the output of
    /// `cargo run -p flux-core --example placement_table` there.
    #[test]
    fn the_documented_tables_are_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/placement.md");
        let text = std::fs::read_to_string(path).expect("docs/placement.md");
        let (_, rest) = text.split_once("<!-- placement:begin -->\n").expect("the first marker");
        let (documented, _) = rest.split_once("<!-- placement:end -->").expect("the last marker");
        assert_eq!(documented, tables());
    }
}

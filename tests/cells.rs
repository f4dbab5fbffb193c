//! The buffer of kept bytes, beside a plain list of what should be in it.

use crate::cells::{Cells, Chain};

/// Numbers that look random and are the same in every run.
fn random(state: &mut u64, limit: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state % limit as u64) as usize
}

fn assert_holds(cells: &Cells, chain: &Chain, bytes: &[u8], from: usize) {
    let mut out = b"before".to_vec();
    cells.copy(chain, from, bytes.len() - from, &mut out);
    assert!(out[..6] == *b"before" && out[6..] == bytes[from..]);
    let first = bytes.len().min(cells.first(chain).len());
    assert_eq!(cells.first(chain)[..first], bytes[..first]);
}

#[test]
fn what_is_in_the_cells_comes_out_whole_whatever_was_removed_and_moved_meanwhile() {
    let (mut cells, mut state) = (Cells::new(64 * 1024 * 1024), 1);
    let mut kept: Vec<(Chain, Vec<u8>)> = Vec::new();
    // It grows, shrinks to little, and grows again, with sizes around those of cells.
    for (round, most) in [30_000, 100, 10_000, 0, 500].into_iter().enumerate() {
        while kept.len() != most {
            if kept.len() < most {
                let length = [0, 1, 40, 127, 128, 129, 256, 1_000, 5_000][random(&mut state, 9)];
                let bytes: Vec<u8> = (0..length).map(|_| random(&mut state, 256) as u8).collect();
                let (head, tail) = bytes.split_at(random(&mut state, length + 1));
                kept.push((cells.insert(&[head, b"", tail]), bytes));
            } else {
                let (chain, bytes) = kept.swap_remove(random(&mut state, kept.len()));
                assert_holds(&cells, &chain, &bytes, random(&mut state, bytes.len() + 1));
                cells.remove(chain);
            }
        }
        kept.iter().for_each(|(chain, bytes)| assert_holds(&cells, chain, bytes, 0));
        let counted: usize = kept.iter().map(|(_, bytes)| Cells::memory(bytes.len())).sum();
        let taken = cells.taken();
        println!("round {round}: {counted} bytes are counted, {taken} taken");
        assert!(taken <= counted + counted / 8 + 2 * 1024 * 1024, "{taken} for {counted}");
    }
}

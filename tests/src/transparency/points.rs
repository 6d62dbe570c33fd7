//! Random points.

use super::Point;

/// `count` points from `seed`: `at` is 1 to `most_before`, `more` is 1 to `most_after`. Each tenth point is
/// within the first thousandth, where a guest sets up its machine.
pub fn random_points(seed: u64, count: usize, most_before: u64, most_after: u64) -> Vec<Point> {
    let mut state = seed;
    let mut below = |most: u64| 1 + splitmix64(&mut state) % most.max(1);
    (0..count)
        .map(|n| {
            let most = if n % 10 == 9 { most_before / 1000 } else { most_before };
            Point { at: below(most), more: below(most_after) }
        })
        .collect()
}

/// SplitMix64, the generator of Steele, Lea and Flood.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_follow_from_the_seed_and_stay_in_their_bounds() {
        let points = random_points(7, 500, 10_000, 300);
        assert_eq!(points, random_points(7, 500, 10_000, 300));
        assert_ne!(points, random_points(8, 500, 10_000, 300));
        assert!(points.iter().all(|p| (1..=10_000).contains(&p.at) && (1..=300).contains(&p.more)));
        assert!(points.iter().skip(9).step_by(10).all(|p| p.at <= 10));
    }
}

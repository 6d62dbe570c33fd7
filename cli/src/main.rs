//! The `squib` command.
fn main() {
    let options = squib::kit::FetchOptions { rootfs: true, ..Default::default() };
    println!("{:?}", squib::kit::Kit::fetch(&options, &|what| eprintln!("{what}")));
}

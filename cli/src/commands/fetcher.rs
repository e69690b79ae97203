//! `rewarm fetcher`, hidden: the process that reads stores for all restores of a state folder, and its workers.

use crate::args::Fetcher;

pub(crate) fn run(args: &Fetcher) -> u8 {
    if args.worker {
        rewarm_fetcher::worker::main()
    } else {
        rewarm_fetcher::keeper::main(args.limit, args.disk, args.idle)
    }
}

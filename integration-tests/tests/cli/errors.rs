//! What the verbs print when something is wrong: error texts are interface.

"""The paper's tables and figures (arXiv 2506.18226), a module each; the protocol is data, in configs/paper."""

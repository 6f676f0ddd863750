//! Numbers that nobody can foretell.

use std::io;

/// 16 bytes from the kernel.
pub fn sixteen() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    super::file::retry_interrupted(|| {
        // SAFETY: the pointer and the length are those of a live array that nobody else uses.
        #[allow(unsafe_code)]
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        // Requests this small are never answered in part.
        match usize::try_from(got) {
            Ok(16) => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_are_alike() {
        assert_ne!(super::sixteen().unwrap(), super::sixteen().unwrap());
    }
}

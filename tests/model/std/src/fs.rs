//! Real files, where each write is a point that the model may let fail.

use crate::point;
use crate::time::Sleepers;
use ::std::cell::Cell;
pub use ::std::fs::*;
use ::std::io::{self, Write};
use ::std::ops::Deref;
use ::std::os::unix::fs::OpenOptionsExt;
use ::std::path::Path;

/// What becomes of writes.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Disk {
    #[default]
    Works,
    IsFull,
    /// Whoever writes waits until it works again.
    IsStuck,
    /// Whoever writes panics.
    Panics,
}

thread_local! {
    static DISK: Cell<Disk> = Cell::default();
    static STUCK: Sleepers = Sleepers::default();
}

pub fn set_disk(disk: Disk) {
    point();
    DISK.set(disk);
    STUCK.with(Sleepers::wake_all);
}

#[derive(Debug)]
pub struct File(::std::fs::File);

#[derive(Clone, Debug)]
pub struct OpenOptions(::std::fs::OpenOptions);

impl File {
    pub fn open(path: impl AsRef<Path>) -> io::Result<File> {
        ::std::fs::File::open(path).map(File)
    }

    pub fn try_clone(&self) -> io::Result<File> {
        self.0.try_clone().map(File)
    }
}

impl Deref for File {
    type Target = ::std::fs::File;
    fn deref(&self) -> &::std::fs::File {
        &self.0
    }
}

impl Write for &File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        point();
        while DISK.get() == Disk::IsStuck {
            STUCK.with(|stuck| stuck.sleep(None));
        }
        match DISK.get() {
            Disk::Works | Disk::IsStuck => (&self.0).write(bytes),
            Disk::IsFull => Err(io::ErrorKind::StorageFull.into()),
            Disk::Panics => crate::panic::on_purpose(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for File {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }
}

impl io::Read for &File {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }
}

impl io::Seek for &File {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        (&self.0).seek(to)
    }
}

impl OpenOptions {
    #[expect(clippy::new_without_default)]
    pub fn new() -> OpenOptions {
        OpenOptions(::std::fs::OpenOptions::new())
    }

    pub fn read(&mut self, is: bool) -> &mut OpenOptions {
        self.0.read(is);
        self
    }

    pub fn write(&mut self, is: bool) -> &mut OpenOptions {
        self.0.write(is);
        self
    }

    pub fn append(&mut self, is: bool) -> &mut OpenOptions {
        self.0.append(is);
        self
    }

    pub fn create(&mut self, is: bool) -> &mut OpenOptions {
        self.0.create(is);
        self
    }

    pub fn create_new(&mut self, is: bool) -> &mut OpenOptions {
        self.0.create_new(is);
        self
    }

    pub fn open(&self, path: impl AsRef<Path>) -> io::Result<File> {
        self.0.open(path).map(File)
    }
}

impl OpenOptionsExt for OpenOptions {
    fn mode(&mut self, mode: u32) -> &mut OpenOptions {
        self.0.mode(mode);
        self
    }

    fn custom_flags(&mut self, flags: i32) -> &mut OpenOptions {
        self.0.custom_flags(flags);
        self
    }
}

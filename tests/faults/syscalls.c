/* Loaded into a process before libc (LD_PRELOAD): sees every change that it asks of the kernel below one folder.
 *
 * It records them (FAULTS_LOG: what `disk.py` reads, one order for all processes), and, armed by `faults_arm`, kills
 * the process at one of them or lets it fail. Calls that change nothing go through unseen, except reads on request.
 *
 * A record is a line of fields that are separated by tabs, then `length` bytes of data:
 *     operation  pid  inode  offset  length  path  second path
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL_BEFORE, KILL_HALF, KILL_AFTER, FAIL_ONCE, FAIL_FROM_HERE };

static struct shared { /* of a process and its children, so that one can read what became of the other */
    long count;
    long sprung;
    char what[256];
} *shared;

static struct { int mode, number, reads; long at; } trap;
static char root[PATH_MAX];
static size_t root_length;
static char log_path[PATH_MAX];
static int log_fd = -1;
static pid_t log_pid;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void set_root(const char *path) {
    snprintf(root, sizeof root, "%s", path ? path : "");
    root_length = strlen(root);
}

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    set_root(getenv("FAULTS_ROOT"));
    snprintf(log_path, sizeof log_path, "%s", getenv("FAULTS_LOG") ? getenv("FAULTS_LOG") : "");
}

/* For tests, through ctypes. */
void faults_arm(const char *folder, int mode, long at, int number, int reads) {
    set_root(folder);
    trap.mode = mode, trap.at = at, trap.number = number, trap.reads = reads;
    memset(shared, 0, sizeof *shared);
}
void faults_disarm(void) { trap.mode = NOTHING; set_root(""); }
long faults_count(void) { return shared->count; }
const char *faults_what(void) { return shared->sprung ? shared->what : ""; }

static int below_root(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
}

static void absolute(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (!name) name = "";
    if (name[0] == '/') base[0] = 0;
    else if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else path_of(folder, base);
    if (snprintf(path, PATH_MAX, "%s%s%s", base, base[0] && name[0] ? "/" : "", name) >= PATH_MAX) path[0] = 0;
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') path[--length] = 0;
}

/* The trap: true where the operation is to fail, errno set. */
static int springs(const char *operation, const char *path) {
    if (trap.mode == NOTHING) return 0;
    long here = __atomic_fetch_add(&shared->count, 1, __ATOMIC_SEQ_CST);
    int is_here = here == trap.at;
    if (is_here || (trap.mode == FAIL_FROM_HERE && here > trap.at)) {
        if (is_here) snprintf(shared->what, sizeof shared->what, "%s %s", operation, path + root_length), shared->sprung = 1;
        if (trap.mode == FAIL_ONCE || trap.mode == FAIL_FROM_HERE) { errno = trap.number; return 1; }
        if (trap.mode == KILL_BEFORE) kill(getpid(), SIGKILL), pause();
    }
    return 0;
}

static int is_at(int mode) { return trap.mode == mode && shared->sprung && shared->count == trap.at + 1; }
static size_t part(size_t length) { return is_at(KILL_HALF) ? length / 2 : length; }
static void maybe_die(void) {
    int saved = errno;
    if (is_at(KILL_HALF) || is_at(KILL_AFTER)) kill(getpid(), SIGKILL), pause();
    errno = saved;
}

/* One order for all processes: the record is written under the same lock as the operation is done. */
static void lock(void) {
    pthread_mutex_lock(&mutex);
    if (!log_path[0]) return;
    if (log_pid != getpid()) {
        REAL(open);
        log_fd = real(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
        log_pid = getpid();
    }
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    while (fcntl(log_fd, F_OFD_SETLKW, &whole) && errno == EINTR);
}

static void unlock(void) {
    int saved = errno;
    if (log_path[0]) {
        struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
        fcntl(log_fd, F_OFD_SETLK, &whole);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

static void all(int fd, const char *data, size_t length) {
    REAL(write);
    while (length) {
        ssize_t count = real(fd, data, length);
        if (count < 0) abort();
        data += count, length -= count;
    }
}

static void record(const char *operation, ino_t inode, off_t offset, const char *data, size_t length, const char *path,
                   const char *second) {
    if (!log_path[0]) return;
    int saved = errno;
    char line[2 * PATH_MAX + 128];
    int size = snprintf(line, sizeof line, "%s\t%d\t%lu\t%ld\t%zu\t%s\t%s\n", operation, getpid(),
                        (unsigned long)inode, (long)offset, data ? length : 0, path, second);
    all(log_fd, line, size);
    if (data) all(log_fd, data, length);
    errno = saved;
}

static ino_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

__attribute__((destructor)) static void end(void) { root_length = 0; }

static void begin_child(void) { pthread_mutex_init(&mutex, NULL); }
__attribute__((constructor)) static void follow_forks(void) { pthread_atfork(NULL, NULL, begin_child); }

/* ------------------------------------------------------------------ open: new names, files cut to nothing */

static int opened(int folder, const char *name, int flags, mode_t mode) {
    REAL(openat);
    char path[PATH_MAX];
    if (!root_length) return real(folder, name, flags, mode);
    absolute(folder, name, path);
    int writes = (flags & O_ACCMODE) != O_RDONLY, changes = flags & (O_CREAT | O_TRUNC);
    if (!below_root(path) || (!writes && !trap.reads)) return real(folder, name, flags, mode);
    if (springs("open", path)) return -1;
    if (!changes) { int fd = real(folder, name, flags, mode); maybe_die(); return fd; }
    lock();
    struct stat before;
    int was_there = !fstatat(folder, name, &before, 0);
    int fd = real(folder, name, flags, mode);
    if (fd >= 0 && !was_there) record("create", inode_of(fd), 0, NULL, 0, path, "");
    if (fd >= 0 && was_there && flags & O_TRUNC) record("truncate", inode_of(fd), 0, NULL, 0, path, "");
    unlock();
    maybe_die();
    return fd;
}

#define OPEN(name, parameters, folder)                                                                                 \
    int name parameters {                                                                                              \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                                         \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        return opened(folder, path, flags, mode);                                                                      \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), folder)

/* ------------------------------------------------------------------ data and lengths */

static int of_interest(int fd, char *path) {
    if (!root_length) return 0;
    path_of(fd, path);
    return below_root(path);
}

static ssize_t written(int fd, const void *data, size_t length, off_t offset, int has_offset) {
    REAL(pwrite);
    __typeof__(&write) plain = (__typeof__(&write))dlsym(RTLD_NEXT, "write");
    char path[PATH_MAX];
    if (!of_interest(fd, path)) return has_offset ? real(fd, data, length, offset) : plain(fd, data, length);
    if (springs("write", path)) return -1;
    length = part(length);
    lock();
    ssize_t count = has_offset ? real(fd, data, length, offset) : plain(fd, data, length);
    if (!has_offset) offset = lseek(fd, 0, SEEK_CUR) - count;
    if (count > 0) record("write", inode_of(fd), offset, data, count, path, "");
    unlock();
    maybe_die();
    return count;
}

ssize_t write(int fd, const void *data, size_t length) { return written(fd, data, length, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset, 1); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset, 1); }

static ssize_t written_parts(int fd, const struct iovec *parts, int count, off_t offset, int has_offset) {
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t done = written(fd, parts[i].iov_base, parts[i].iov_len, offset + total, has_offset);
        if (done < 0) return total ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    char path[PATH_MAX];
    return of_interest(fd, path) ? written_parts(fd, parts, count, 0, 0) : real(fd, parts, count);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(pwritev);
    char path[PATH_MAX];
    return of_interest(fd, path) ? written_parts(fd, parts, count, offset, 1) : real(fd, parts, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) { return pwritev(fd, parts, count, offset); }

/* What the kernel copied by itself is read back. */
static void record_copy(int fd, ssize_t count, const char *path) {
    if (count <= 0 || !log_path[0]) return;
    REAL(open);
    char self[64];
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    int again = real(self, O_RDONLY);
    off_t offset = lseek(fd, 0, SEEK_CUR) - count;
    char *data = malloc(count);
    if (again < 0 || pread(again, data, count, offset) != count) abort();
    record("write", inode_of(fd), offset, data, count, path, "");
    free(data);
    close(again);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t length) {
    REAL(sendfile);
    char path[PATH_MAX];
    if (!of_interest(to, path)) return real(to, from, offset, length);
    if (springs("write", path)) return -1;
    if (is_at(KILL_HALF)) { struct stat s; if (!fstat(from, &s) && (off_t)length > s.st_size) length = s.st_size; }
    lock();
    ssize_t count = real(to, from, offset, part(length));
    record_copy(to, count, path);
    unlock();
    maybe_die();
    return count;
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t length) { return sendfile(to, from, offset, length); }

ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t length, unsigned flags) {
    REAL(copy_file_range);
    char path[PATH_MAX];
    if (!of_interest(to, path)) return real(from, from_offset, to, to_offset, length, flags);
    if (springs("write", path)) return -1;
    if (to_offset) abort(); /* nobody here does; to be recorded it would have to be read from there */
    lock();
    ssize_t count = real(from, from_offset, to, to_offset, part(length), flags);
    record_copy(to, count, path);
    unlock();
    maybe_die();
    return count;
}

static int resized(int fd, off_t length, int (*change)(int, off_t)) {
    char path[PATH_MAX];
    if (!of_interest(fd, path)) return change(fd, length);
    if (springs("truncate", path)) return -1;
    lock();
    int result = change(fd, length);
    if (!result) record("truncate", inode_of(fd), length, NULL, 0, path, "");
    unlock();
    maybe_die();
    return result;
}
int ftruncate(int fd, off_t length) { REAL(ftruncate); return resized(fd, length, real); }
int ftruncate64(int fd, off_t length) { REAL(ftruncate); return resized(fd, length, real); }

static int reserve(int fd, off_t offset, off_t length) {
    int (*real)(int, off_t, off_t) = (int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate");
    char path[PATH_MAX];
    if (!of_interest(fd, path)) return real(fd, offset, length);
    if (springs("allocate", path)) return errno;
    lock();
    struct stat before;
    int known = !fstat(fd, &before), result = real(fd, offset, length);
    if (!result && known && before.st_size < offset + length) record("truncate", before.st_ino, offset + length, NULL, 0, path, "");
    unlock();
    maybe_die();
    return result;
}
int posix_fallocate(int fd, off_t offset, off_t length) { return reserve(fd, offset, length); }
int posix_fallocate64(int fd, off_t offset, off_t length) { return reserve(fd, offset, length); }

static int synced(int fd, int (*sync)(int)) {
    char path[PATH_MAX];
    if (!of_interest(fd, path)) return sync(fd);
    if (springs("fsync", path)) return -1;
    lock();
    int result = sync(fd);
    if (!result) record("fsync", inode_of(fd), 0, NULL, 0, path, "");
    unlock();
    maybe_die();
    return result;
}
int fsync(int fd) { REAL(fsync); return synced(fd, real); }
int fdatasync(int fd) { REAL(fdatasync); return synced(fd, real); }

/* ------------------------------------------------------------------ names */

static int named(const char *operation, int first_folder, const char *first, int second_folder, const char *second,
                 int flags) {
    char path[PATH_MAX], target[PATH_MAX];
    absolute(first_folder, first, path);
    if (second) absolute(second_folder, second, target); else target[0] = 0;
    int counts = below_root(path) || (second && below_root(target));
    if (counts && springs(operation, below_root(path) ? path : target)) return -1;
    if (counts) lock();
    int result;
    if (!strcmp(operation, "rename")) {
        REAL(renameat2);
        result = real(first_folder, first, second_folder, second, flags);
    } else if (!strcmp(operation, "link")) {
        REAL(linkat);
        result = real(first_folder, first, second_folder, second, flags);
    } else if (!strcmp(operation, "mkdir")) {
        REAL(mkdirat);
        result = real(first_folder, first, flags);
    } else {
        REAL(unlinkat);
        result = real(first_folder, first, flags);
    }
    if (counts) {
        struct stat made = {0};
        if (!result && !strcmp(operation, "mkdir")) fstatat(first_folder, first, &made, AT_SYMLINK_NOFOLLOW);
        if (!result) record(operation, made.st_ino, 0, NULL, 0, path, target);
        unlock();
        maybe_die();
    }
    return result;
}

int rename(const char *from, const char *to) { return named("rename", AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return named("rename", a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return named("rename", a, from, b, to, flags); }
int link(const char *from, const char *to) { return named("link", AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char *from, int b, const char *to, int flags) { return named("link", a, from, b, to, flags); }
int unlink(const char *path) { return named("unlink", AT_FDCWD, path, 0, NULL, 0); }
int unlinkat(int folder, const char *path, int flags) { return named("unlink", folder, path, 0, NULL, flags); }
int rmdir(const char *path) { return named("unlink", AT_FDCWD, path, 0, NULL, AT_REMOVEDIR); }
int mkdir(const char *path, mode_t mode) { return named("mkdir", AT_FDCWD, path, 0, NULL, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return named("mkdir", folder, path, 0, NULL, mode); }

/* ------------------------------------------------------------------ reads, for errors only */

static int read_fails(int fd) {
    char path[PATH_MAX];
    return trap.reads && of_interest(fd, path) && springs("read", path);
}
ssize_t read(int fd, void *data, size_t length) { REAL(read); return read_fails(fd) ? -1 : real(fd, data, length); }
ssize_t pread(int fd, void *data, size_t length, off_t offset) {
    REAL(pread);
    return read_fails(fd) ? -1 : real(fd, data, length, offset);
}
ssize_t pread64(int fd, void *data, size_t length, off_t offset) {
    REAL(pread);
    return read_fails(fd) ? -1 : real(fd, data, length, offset);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(preadv);
    return read_fails(fd) ? -1 : real(fd, parts, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(preadv);
    return read_fails(fd) ? -1 : real(fd, parts, count, offset);
}

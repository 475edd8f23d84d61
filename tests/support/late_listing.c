/* Preloaded: a folder does not list files that were changed in the last LATE_SECONDS, as a network disk's cache does not.
 * They can be opened by name. cc -shared -fPIC -o late_listing.so late_listing.c -ldl
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int is_late(DIR *folder, const char *name) {
    struct stat status;
    const char *seconds = getenv("LATE_SECONDS"), *below = getenv("LATE_BELOW");
    char path[4096], link[64];
    if (!seconds || !below || name[0] == '.') return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd(folder));
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, below, strlen(below))) return 0;
    if (fstatat(dirfd(folder), name, &status, AT_SYMLINK_NOFOLLOW)) return 0;
    return time(NULL) - status.st_ctime < atoi(seconds);
}

#define HOOK(NAME, ENTRY)                                              \
    struct ENTRY *NAME(DIR *folder) {                                  \
        static struct ENTRY *(*next)(DIR *);                           \
        if (!next) next = dlsym(RTLD_NEXT, #NAME);                     \
        struct ENTRY *entry = next(folder);                            \
        while (entry && is_late(folder, entry->d_name)) entry = next(folder); \
        return entry;                                                  \
    }
HOOK(readdir, dirent)
HOOK(readdir64, dirent64)
